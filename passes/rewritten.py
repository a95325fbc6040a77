"""The step graph of plans that have another one than the rest: those for which a measurement has turned passes on
(schedules/switches.py), and steps of which each token's logits are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from llmc.compiler.graph import clone
from llmc.compiler.kernel import FEW_ROWS
from llmc.passes.append_in_product import append_in_product
from llmc.passes.defer_norm import defer_norm
from llmc.passes.defer_norm_in_prompts import defer_norm_in_prompts
from llmc.passes.take_all_rows import take_all_rows

Pass = Callable[[ir.Model, str], int]
PASSES: dict[str, Pass] = {
    "defer_norm_in_prompts": lambda model, _: defer_norm_in_prompts(model),
    "append_in_product": lambda model, kv_dtype: append_in_product(model, kv_dtype=kv_dtype),
}
"""Passes that a measurement may turn on, in the order in which they run: a product that appends may apply a norm that
is deferred.  Each takes the graph and the KV cache's dtype."""


@dataclass
class Rewritten:
    """The graphs of those plans, each made once.

    step_graph: is not changed.  switched: gives the names of the passes that are on in plans of M rows; None: none are.
    """

    step_graph: ir.Model
    kv_dtype: str
    switched: Callable[[int], frozenset[str]] | None
    models: dict[frozenset[str], ir.Model | None] = field(default_factory=dict)
    in_one: dict[frozenset[str], ir.Graph] = field(default_factory=dict)

    def graph(self, m: int) -> ir.Graph:
        """The graph of a body of M = m rows."""
        return (self.model(self.on(m)) or self.step_graph).graph

    def joined(self, m: int) -> ir.Graph:
        """The graph of a step of M = m tokens that gives logits of each."""
        on = self.on(m)
        if on not in self.in_one:
            model = clone(self.model(on) or self.step_graph)
            take_all_rows(model)
            defer_norm(model)
            self.in_one[on] = model.graph
        return self.in_one[on]

    def on(self, m: int) -> frozenset[str]:
        """The passes that are on in plans of M = m rows."""
        return self.switched(m) if self.switched and m > FEW_ROWS else frozenset()

    def model(self, on: frozenset[str]) -> ir.Model | None:
        """The graph after these passes; None where they change nothing."""
        if on not in self.models:
            self.models[on] = self.with_passes(on) if on else None
        return self.models[on]

    def with_passes(self, on: frozenset[str]) -> ir.Model | None:
        model = clone(self.step_graph)
        n_rewrites = sum(rewrite(model, self.kv_dtype) for name, rewrite in PASSES.items() if name in on)
        return model if n_rewrites else None

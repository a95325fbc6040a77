"""The step graph of plans for which a measurement has turned passes on (schedules/switches.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from llmc.compiler.graph import clone
from llmc.compiler.kernel import FEW_ROWS
from llmc.passes.append_in_product import append_in_product
from llmc.passes.defer_norm_in_prompts import defer_norm_in_prompts

Pass = Callable[[ir.Model, str], int]
PASSES: dict[str, Pass] = {
    "defer_norm_in_prompts": lambda model, _: defer_norm_in_prompts(model),
    "append_in_product": lambda model, kv_dtype: append_in_product(model, kv_dtype=kv_dtype),
}
"""In the order in which they run: what appends applies a norm that is deferred.  They take the KV cache's dtype too."""


@dataclass
class Rewritten:
    """step_graph: stays as it is.  switched: names of the passes that are on in plans of M rows; None: none are."""

    step_graph: ir.Model
    kv_dtype: str
    switched: Callable[[int], frozenset[str]] | None
    graphs: dict[frozenset[str], ir.Graph | None] = field(default_factory=dict)

    def graph(self, m: int) -> ir.Graph | None:
        """Of a body of M = m rows, a prompt's; None where it is the step graph."""
        on = self.switched(m) if self.switched and m > FEW_ROWS else frozenset()
        if on not in self.graphs:
            self.graphs[on] = self.with_passes(on) if on else None
        return self.graphs[on]

    def with_passes(self, on: frozenset[str]) -> ir.Graph | None:
        model = clone(self.step_graph)
        n_rewrites = sum(rewrite(model, self.kv_dtype) for name, rewrite in PASSES.items() if name in on)
        return model.graph if n_rewrites else None

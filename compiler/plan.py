"""Step plans, as data: for each number of tokens M, a table of kernel calls over one arena.

The graph is cut in two. A *body* takes M tokens through every layer and leaves their hidden states in the arena; a
*head* takes R of those rows to logits; on a GPU a *sampler* draws tokens from those, and a *joined* step is a body and
a head in one, where every token's logits are wanted. planner.py makes the plans, artifact.py writes them, the runtime
walks them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmc.compiler.kernel import PAGE_TOKENS, Call, Implementation, Kernel, Layout
from llmc.runtime.format import PLAN_KINDS, Argument

STEP_TEXTS = 64
"""Texts that are read whole in a step for which the cache has room, where nobody asks for more."""
BODY, HEAD, SAMPLER, JOINED = map(PLAN_KINDS.index, ("body", "head", "sampler", "joined"))


@dataclass(frozen=True)
class PlacedWeight:
    """A constant, how it lies, and where in the weights section."""

    value: ir.Value
    layout: Layout
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class PlannedCall:
    """One launch with its operands resolved; `node` is the graph node it belongs to."""

    kernel: int
    grid: int
    arguments: tuple[Argument, ...]
    node: str
    n_bytes: int
    n_operations: int


@dataclass(frozen=True)
class StepPlan:
    """The calls of one body (n_rows = M), head (n_rows = R), or joined step (n_rows = M = R)."""

    kind: int
    n_rows: int
    calls: tuple[PlannedCall, ...]


@dataclass(frozen=True)
class Choice:
    """Which schedule a call took in one plan, and the nodes that make that call."""

    kind: int
    n_rows: int
    call: Call
    implementation: Implementation
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Everything the artifact's plan section says, and what must be compiled and packed for it.

    layer_bytes: of a page, of each layer that keeps keys and values.  n_layers: all that attend, those too that share
    another's.  slot_bytes: of the states of one sequence; default_slots: how many sequences may have some, where nobody
    says.  n_tokens: how many different ones there are, where columns of the logits are something else; 0 elsewhere.
    is_whole: whether they see what is behind them, so that all of a text are in one step.  n_types: of tokens, where
    texts are given labels; 0 elsewhere.  adapters: the names of those that a sequence may choose from."""

    plans: tuple[StepPlan, ...]
    kernels: tuple[Kernel, ...]
    weights: tuple[PlacedWeight, ...]
    choices: tuple[Choice, ...]
    weight_bytes: int
    arena_bytes: int
    scratch_bytes: int
    layer_bytes: tuple[int, ...]
    n_layers: int
    n_context: int
    n_vocab: int
    page_tokens: int = PAGE_TOKENS
    slot_bytes: int = 0
    default_slots: int = 0
    n_tokens: int = 0
    is_whole: bool = False
    n_types: int = 0
    adapters: tuple[str, ...] = ()

    @property
    def default_kv_tokens(self) -> int:
        """Room in the cache where nobody asks for some: for the longest text, or for the largest step of whole ones."""
        if not self.is_whole:
            return self.n_context
        return max(plan.n_rows for plan in self.plans if plan.kind == BODY) + STEP_TEXTS * self.page_tokens

    @property
    def kv_page_bytes(self) -> int:
        return sum(self.layer_bytes)

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.n_context // self.page_tokens)

"""Step plans, as data: for each number of tokens M, a table of kernel calls over one arena.

The graph is cut in two. A *body* takes M tokens through every layer and leaves their hidden states in the arena; a
*head* takes R of those rows to logits; on a GPU a *sampler* draws tokens from those, and a *joined* step is a body and
a head in one, where every token's logits are wanted. A *tower* makes rows that stand for tokens out of a tile of a
picture. Where sequences choose adapters, a GPU has each body and joined step twice: the second, *adapted*, is for steps
in which a row has one. planner.py makes the plans, artifact.py writes them, the runtime walks them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmc.compiler.kernel import PAGE_TOKENS, Call, Implementation, Kernel, Layout
from llmc.runtime.format import NOT_SIZED, PLAN_KINDS, Argument, Sized

STEP_TEXTS = 64
"""Texts in a step for which the cache of a model that reads texts whole has room, by default."""
BODY, HEAD, SAMPLER, JOINED, TOWER, ADAPTED, JOINED_ADAPTED = range(len(PLAN_KINDS))


@dataclass(frozen=True)
class PlacedWeight:
    """A constant, how it lies, and where in the weights section."""

    value: ir.Value
    layout: Layout
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class PlannedCall:
    """One launch with its operands resolved.

    kernel: index in the program's kernels.  node: name of the graph node it belongs to.
    n_bytes, n_operations: what it moves and computes, as its schedule says.
    """

    kernel: int
    grid: int
    arguments: tuple[Argument, ...]
    node: str
    n_bytes: int
    n_operations: int


@dataclass(frozen=True)
class StepPlan:
    """The calls of one body (n_rows = M), head (n_rows = R), joined step (n_rows = M = R), or tower (n_rows: of a
    tile)."""

    kind: int
    n_rows: int
    calls: tuple[PlannedCall, ...]


@dataclass(frozen=True)
class Choice:
    """Which implementation a call got in the plan of this kind and n_rows, and the names of the nodes that make it."""

    kind: int
    n_rows: int
    call: Call
    implementation: Implementation
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Everything the artifact's plan section says, and what must be compiled and packed for it.

    weight_bytes, arena_bytes, scratch_bytes: of the weights section, and of the memory that all plans share.
    layer_bytes: of each layer that keeps keys and values, in one page of the KV cache.
    n_layers: all that attend, including those that share another layer's keys and values.
    n_context: most tokens of a sequence.  n_vocab: columns of the logits.  page_tokens: tokens of a page.
    slot_bytes: of the states of one sequence.  default_slots: how many sequences have states, by default.
    n_tokens: how many different tokens there are, where the columns of the logits are something else; else 0.
    is_whole: whether a token attends to later ones too, so that all of a text are in one step.
    n_types: how many token types, where texts are given labels; else 0.
    adapters: names of the adapters that a sequence may choose from.
    n_row: numbers of a row that may stand for a token, f32; 0: none may.
    tile: channels, height and width of what the tower takes, f32; zeros where there is none.
    picture_rows: how many rows of a picture see each other; 0: no row sees what is behind it.
    is_turned: whether rows turn queries and keys by where they are in their picture.
    sized: what a tower of pictures of any size is made for, which has a plan for each of several numbers of rows.
    """

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
    n_row: int = 0
    tile: tuple[int, int, int] = (0, 0, 0)
    picture_rows: int = 0
    is_turned: bool = False
    sized: Sized = NOT_SIZED

    @property
    def default_kv_tokens(self) -> int:
        """Tokens that the cache has room for by default: the longest text, or the largest step of whole texts."""
        if not self.is_whole:
            return self.n_context
        return max(plan.n_rows for plan in self.plans if plan.kind == BODY) + STEP_TEXTS * self.page_tokens

    @property
    def kv_page_bytes(self) -> int:
        return sum(self.layer_bytes)

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.n_context // self.page_tokens)

"""Norms over the last axis on a GPU, alone or behind an addition (schedules/norm_call.py): include/norm_rows.cuh.

One launch, a block a row, or in a prompt several.  x is f32; the norm is f32, or tiled in the type that the products
behind it multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

from llmc.compiler.kernel import Call, DType, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.norm_call import parse, vector_layouts
from llmc.schedules.rule import Rule

Kind = Literal["none", "rms", "layer"]

WARPS = 8
MULTIPROCESSORS, FLIGHT_ELEMENTS = 132, 8192
"""Multiprocessors of an H200, and how many elements must be on their way to each, on paper, to keep its memory
busy.  That gives a number of blocks, and if there are more rows, a block takes several.  With a block for each row,
half and more of what came from L2 was weight and bias: 2048 rows of 4096 took 20 µs with a weight and 29 with a bias
too, where their own bytes take 12."""
CHUNKS, MOST_WARPS, MOST_BLOCKS = 2, 16, 16
"""Limits: chunks of eight elements that a thread has of a row; warps of a block, given their registers; blocks of a
multiprocessor."""


@dataclass(frozen=True)
class Norm:
    """`rows` rows of `columns` elements.  kind: "none" brings x to tiles as it is.  adds: x + residual first; bias:
    added last; y: f32, or the element type of a tiled result."""

    rows: int
    columns: int
    kind: Kind
    adds: bool = False
    bias: bool = False
    epsilon: float = 0.0
    y: DType = "f32"

    def __str__(self) -> str:
        rows = f"{self.each} rows" if self.each > 1 else "a row"
        return f"{32 * self.warps} threads for {rows}"

    @property
    def each(self) -> int:
        """Rows of a block."""
        fits = self.kind != "none" and not self.adds and self.columns % 8 == 0 and self._row_warps <= MOST_WARPS
        blocks = MULTIPROCESSORS * min(MOST_BLOCKS, ceil(FLIGHT_ELEMENTS / self.columns))
        return max(1, ceil(self.rows / blocks)) if fits else 1

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self._row_warps if self.each > 1 else WARPS

    @property
    def _row_warps(self) -> int:
        """Warps that hold a row in their registers."""
        return ceil(ceil(self.columns / 64) * 8 / (32 * CHUNKS))

    @property
    def tiled(self) -> bool:
        return self.y != "f32"


def match(call: Call, target: Target) -> Norm | None:
    asked = parse(call)
    if asked is None:
        return None
    y = call.outputs[-1] if asked.adds else call.outputs[0]
    kind: Kind = "layer" if asked.centred else "rms"
    return Norm(asked.rows, asked.columns, kind, asked.adds, asked.bias, asked.epsilon, y.dtype if y.tiled else "f32")


def implement(call: Call, norm: Norm, target: Target) -> Implementation:
    asked = parse(call)
    assert asked is not None
    return Implementation((launch(norm, asked.operands),), layouts=vector_layouts(call, asked))


def launch(norm: Norm, operands: Sequence[Operand]) -> Launch:
    """One launch over x, [residual], [weight], [bias], [sum], y; all f32 but a tiled y."""
    size = norm.rows * norm.columns
    vectors = (norm.kind != "none") + norm.bias
    n_bytes = 4 * size * (3 if norm.adds else 1) + 4 * norm.columns * vectors + size * (2 if norm.tiled else 4)
    n_operations = size * {"none": 0, "rms": 4, "layer": 7}[norm.kind]
    key = f"norm_source({norm!r})"
    words = ("add" * norm.adds, {"none": "tile"}.get(norm.kind, f"{norm.kind}norm"), "bias" * norm.bias)
    name = "_".join(filter(None, (*words, f"{norm.rows}x{norm.columns}", short_hash(key))))
    kernel = Kernel(name, key, partial(norm_source, name, norm), n_threads=32 * norm.warps, dependent=True)
    return Launch(kernel, tuple(operands), ceil(norm.rows / norm.each), n_bytes, n_operations)


def norm_source(name: str, norm: Norm) -> str:
    """The kernel's CUDA C++."""
    y = C_TYPES[norm.y]
    present = {"residual": norm.adds, "weight": norm.kind != "none", "bias": norm.bias}
    vectors = [f"const float *{vector}" for vector, there in present.items() if there]
    parameters = ["const float *x", *vectors, *["float *sum"] * norm.adds, f"{y} *y"]
    arguments = [vector if there else "nullptr" for vector, there in present.items()]
    flags = f"kAdds = {c_bool(norm.adds)}, kNormBias = {c_bool(norm.bias)}"
    call = f"norm_rows<Rows>(x, {', '.join(arguments)}, {'sum' if norm.adds else 'nullptr'}, y);"
    if norm.each > 1:
        call = f"norm_many_rows<Rows>(x, {', '.join(arguments[1:])}, y);"
    return (
        '#include "norm_rows.cuh"\n\n'
        "struct Rows {\n"
        f"    using Y = {y};\n"
        f"    static constexpr int kRows = {norm.rows}, kK = {norm.columns};\n"
        f"    static constexpr int kWarps = {norm.warps}, kEach = {norm.each};\n"
        f"    static constexpr bool {flags};\n"
        f"    static constexpr Norm kNorm = Norm::{norm.kind};\n"
        f"    static constexpr float kEpsilon = {norm.epsilon!r}f;\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * norm.warps})\n{name}({", ".join(parameters)}) {{\n'
        f"    {call}\n"
        "}\n"
    )


def c_bool(value: bool) -> str:
    return "true" if value else "false"


RULES = (Rule("norm", match, implement),)

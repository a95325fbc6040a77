"""What tokens' adapters add to a product on a GPU: llmc.{…Norm}LowRank…, in two launches (include/low_rank.cuh).

    down    thin[m] = A_e x'[m],  e = adapters[m]       x' is x, or its norm
    up      y[m] += B_e thin[m]                         in place, or on the way through a gate

Of up to 16 tokens, of weights in f32, and where a part's columns are no multiple of 8, a block has a row.  Of more a
warp has 16, and multiplies with them one after the other the adapters that are among them.  Up to 128 tokens a block
makes 8 outputs of A, so that there are blocks enough; of more up to 48, so that x is read less often.

Bytes: A and B of each adapter, 2 (P·r K + N r) in bf16, x and y twice in f32: of 2048 tokens and N = 12288 200 MB, as
much as 47 µs of an H200's memory, which no product beside it hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np

from llmc.compiler.kernel import (
    DTYPE_BYTES,
    Call,
    DType,
    Implementation,
    Kernel,
    Launch,
    Layout,
    Operand,
    RowMajor,
    numpy_dtype,
    short_hash,
)
from llmc.compiler.ops import DOMAIN, LOW_RANKS, OPERATORS
from llmc.compiler.target import Target
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import TILE
from llmc.schedules.rule import Rule

Array = np.ndarray[Any, Any]
FEW = 16
"""Tokens, up to which a block has one of them."""
ROWS, WARPS, THREADS, COLUMNS, OUTPUTS = 16, 8, 256, 64, 2
"""As in include/low_rank.cuh."""
MOST_OUTPUTS = 48
"""Of A, that a block of tiles makes: of more its registers would not do."""
STEP = 32
"""A row of A is filled up with zeros to so many elements."""
NORMS = {"": "none", "RMSNorm": "rms", "LayerNorm": "layer"}
ACTIVATIONS = {"": "none", "Silu": "silu", "Gelu": "gelu", "GeluTanh": "gelu_tanh"}


@dataclass(frozen=True)
class Stretched:
    """A constant [E, rows, columns] whose rows are filled up with zeros to whole steps."""

    dtype: DType

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape[:-1]) * ceil(shape[-1] / STEP) * STEP * DTYPE_BYTES[self.dtype]

    def pack(self, array: Array) -> Array:
        stretched = np.zeros((*array.shape[:-1], ceil(array.shape[-1] / STEP) * STEP), numpy_dtype(self.dtype))
        stretched[..., : array.shape[-1]] = array
        return stretched

    def __str__(self) -> str:
        return f"{self.dtype} row-major, rows of whole {STEP}"


@dataclass(frozen=True)
class LowRank:
    """y [m, n], x [m, k], a [adapters, parts · rank, k], b [adapters, n, rank] of this dtype; sizes: columns of each
    part.  activation: of the gate, "" for none; strips: how its columns stand in y; norm: of x, "" for none.
    tiled_x, tiled_y: whether x lies in tiles, and what a gate gives."""

    m: int
    n: int
    k: int
    rank: int
    sizes: tuple[int, ...]
    dtype: DType
    activation: str
    strips: bool
    norm: str
    epsilon: float
    tiled_x: bool
    tiled_y: bool

    def __str__(self) -> str:
        return f"tiles of {ROWS} tokens" if self.by_tiles else "a block a token"

    @property
    def by_tiles(self) -> bool:
        whole = not any(size % 8 for size in self.sizes) and not (self.tiled_y and self.results % TILE)
        return self.m > FEW and self.dtype != "f32" and whole

    @property
    def ranks(self) -> int:
        """Of all parts."""
        return len(self.sizes) * self.rank

    @property
    def results(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.activation else self.n

    @property
    def outputs(self) -> int:
        """Of A, that a block of tiles makes."""
        most = 8 if self.m <= 128 else 16 if self.m <= 256 else MOST_OUTPUTS
        return ceil(self.ranks / ceil(self.ranks / most) / 8) * 8

    @property
    def written(self) -> int:
        """Columns of the result and what fills up its tiles."""
        return ceil(self.results / TILE) * TILE if self.tiled_y else self.results

    @property
    def grids(self) -> tuple[int, int]:
        """Blocks of both launches."""
        if self.by_tiles:
            tiles = ceil(self.m / ROWS)
            return tiles * ceil(self.ranks / self.outputs), tiles * ceil(self.results / (COLUMNS * WARPS))
        return self.m * ceil(self.ranks / OUTPUTS), self.m * ceil(self.written / THREADS)


def match(call: Call, target: Target) -> LowRank | None:
    parts = LOW_RANKS.get(call.op.removeprefix(f"{DOMAIN}."))
    if parts is None:
        return None
    named = dict(zip(OPERATORS[parts.name].inputs, call.inputs, strict=True))
    y, x, a, b = (named[name] for name in ("y", "x", "a", "b"))
    sizes = call.attribute(f"input.{len(call.inputs) - 1}")
    if y is None or x is None or a is None or b is None or sizes is None:
        return None
    result, rank = call.outputs[0], b.shape[2]
    fits = a.dtype in ("f32", "bf16", "f16") and rank % 8 == 0 and y.dtype == "f32" and not y.tiled
    if not fits or (x.tiled and parts.norm) or (x.tiled and x.dtype != a.dtype) or (result.tiled and a.dtype == "f32"):
        return None
    if result.tiled and result.dtype != a.dtype:
        return None
    epsilon = float(call.attribute("epsilon", 0.0))
    (m, n), k, gate = y.shape, x.shape[1], (parts.activation, parts.strips)
    return LowRank(m, n, k, rank, tuple(sizes), a.dtype, *gate, parts.norm, epsilon, x.tiled, result.tiled)


def implement(call: Call, low: LowRank, target: Target) -> Implementation:
    names = OPERATORS[call.op.removeprefix(f"{DOMAIN}.")].inputs
    at = {name: Operand("input", index) for index, name in enumerate(names)}
    vectors = [at[name] for name in ("norm_weight", "norm_bias") if name in at]
    thin, result = Operand("temp", 0), Operand("output", 0)
    size, b_bytes = DTYPE_BYTES[low.dtype], DTYPE_BYTES[low.dtype] * low.n * low.rank
    x_bytes = low.m * low.k * (2 if low.tiled_x else 4)
    written = low.m * low.results * (2 if low.tiled_y else 4)
    places = [at["y"], result] if low.activation else [result]
    operands = ([at["x"], *vectors, at["adapters"], at["a"], thin], [thin, at["adapters"], at["b"], *places])
    moved = size * low.ranks * low.k + x_bytes, b_bytes + 4 * low.m * low.n + written
    done = 2 * low.m * low.ranks * low.k, 2 * low.m * low.n * low.rank
    launches = tuple(
        Launch(kernel_of(low, which), tuple(operands[i]), low.grids[i], moved[i], done[i])
        for i, which in enumerate(("down", "up"))
    )
    layouts: dict[int, Layout] = {operand.index: RowMajor("f32") for operand in vectors}
    layouts |= {at["a"].index: Stretched(low.dtype), at["b"].index: RowMajor(low.dtype)}
    return Implementation(launches, (4 * low.m * low.ranks,), layouts=layouts)


def kernel_of(low: LowRank, which: str) -> Kernel:
    """One of the two kernels."""
    body = source(low, which)
    size = low.k if which == "down" else low.n
    name = f"low_rank_{which}_{size}x{low.ranks}_{short_hash(body)}"
    return Kernel(name, body, partial(body.replace, "low_rank_kernel", name), n_threads=THREADS, dependent=True)


def source(low: LowRank, which: str) -> str:
    """The kernel's CUDA C++, whose name is still `low_rank_kernel`."""
    is_gate = bool(low.activation)
    element, x, y = (C_TYPES[each] for each in (low.dtype, x_type(low), y_type(low)))
    vectors = "".join(f", const float *{name}" for name in ("norm_weight", "norm_bias")[: len(norm_words(low))])
    given = {
        "down": f"const {x} *x{vectors}, const int *adapters, const {element} *a, float *thin",
        "up": f"const float *thin, const int *adapters, const {element} *b, float *y{f', {y} *out' * is_gate}",
    }
    norm = ", ".join([*norm_words(low), "nullptr", "nullptr"][:2])
    passed = {"down": f"{{x, {norm}}}, adapters, a, thin", "up": f"thin, adapters, b, y, {'out' if is_gate else 'y'}"}
    function = f"low_rank_{which}_{'tiles' if low.by_tiles else 'rows'}"
    return (
        f'#include "low_rank.cuh"\n\n{layer(low, which)}\n'
        f'extern "C" __global__ void __launch_bounds__({THREADS})\n'
        f"low_rank_kernel({given[which]}) {{\n"
        f"    {function}<Low>({passed[which]});\n}}\n"
    )


def layer(low: LowRank, which: str) -> str:
    """The struct that the header is told by; what one of the two kernels does not ask is left at nothing, so that it is
    the same kernel for other nodes and numbers of tokens."""
    is_down = which == "down"
    is_told = (low.tiled_x if is_down else low.tiled_y) or (low.by_tiles and low.m % ROWS)
    m, n, k = low.m if is_told else 0, 0 if is_down else low.n, low.k if is_down else 0
    ends = [sum(low.sizes[: part + 1]) for part in range(len(low.sizes))]
    cases = "".join(f"part == {part} ? {end} : " for part, end in enumerate(ends[:-1]))
    flags = {
        "kNormBias": is_down and low.norm == "LayerNorm",
        "kGate": bool(low.activation) and not is_down,
        "kStrips": low.strips and not is_down,
    }
    return (
        "struct Low {\n"
        f"    using T = {C_TYPES[low.dtype]};\n"
        f"    using X = {C_TYPES[x_type(low)] if is_down else 'float'};\n"
        f"    using Y = {'float' if is_down else C_TYPES[y_type(low)]};\n"
        f"    static constexpr int kM = {m}, kN = {n}, kK = {k};\n"
        f"    static constexpr int kRank = {low.rank}, kParts = {len(low.sizes)};\n"
        f"    static constexpr int kOutputs = {low.outputs if is_down else 8};\n"
        f"    static constexpr bool {', '.join(f'{flag} = {str(value).lower()}' for flag, value in flags.items())};\n"
        f"    static constexpr Norm kNorm = Norm::{NORMS[low.norm if is_down else '']};\n"
        f"    static constexpr float kEpsilon = {low.epsilon if is_down else 0.0!r}f;\n"
        f"    static constexpr Activation kActivation = Activation::{ACTIVATIONS['' if is_down else low.activation]};\n"
        "    static __host__ __device__ constexpr int ends(int part) {\n"
        f"        return {0 if is_down else f'{cases}{ends[-1]}'};\n"
        "    }\n"
        "};\n"
    )


def norm_words(low: LowRank) -> list[str]:
    return ["norm_weight", "norm_bias"][: {"": 0, "RMSNorm": 1, "LayerNorm": 2}[low.norm]]


def x_type(low: LowRank) -> str:
    return low.dtype if low.tiled_x else "f32"


def y_type(low: LowRank) -> str:
    return low.dtype if low.tiled_y else "f32"


RULES = (Rule("low_rank", match, implement),)

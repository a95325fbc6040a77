"""Layers with a state on a GPU: short causal convolutions and the gated delta rule over the slots of a step's sequences
(include/causal_conv.cuh, delta_rule.cuh, state_rows.cuh).

A state lies in its slot in float32: that of a convolution as [L - 1][C], that of a rule as [VH][DV / 4][DK][4], so
that a warp's four columns are one piece of memory.  The order of sums does not depend on the step's rows: a row has the
same bits however a prompt is cut and whoever stands beside it.

Bytes of a rule: a row's state comes and goes once where rows are few, 8 VH DK DV a row, and a prompt's chunk once for
all of its rows.  A prompt is bound by its rows' order: about 150 instructions a row and warp, two warps a scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.rule import Rule
from llmc.schedules.states_call import CONVS, DELTA_RULES, SELECTIVE_RULE, conv_layouts, conv_sizes_of, sizes_of

FEW_ROWS = 64
"""Rows of a step that may all be of other sequences; more are a prompt's."""
RUNS = 16
"""Sequences of a prompt's step that blocks take side by side."""
CONV_THREADS, CONV_TILE, MOST_TAPS = 128, 16, 16
MOST_KEY_DIM = 512
"""What a lane has of a column is DK / 32 registers."""


@dataclass(frozen=True)
class Conv:
    """rows of `channels`; taps of the weight.  tile: rows of a thread.  stride: float32 from one slot's state to the
    next one's."""

    rows: int
    channels: int
    taps: int
    bias: bool
    silu: bool
    stride: int

    @property
    def tile(self) -> int:
        return 1 if self.rows <= FEW_ROWS else CONV_TILE

    @property
    def grid(self) -> int:
        return ceil(self.rows / self.tile) * ceil(self.channels / CONV_THREADS)

    def __str__(self) -> str:
        return f"{self.tile} rows a thread"


@dataclass(frozen=True)
class DeltaRule:
    """rows of value_heads, which share key_heads.  softplus: it works out its own gates.  stride: as of a Conv.  delta:
    not Mamba 2's rule."""

    rows: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    scale: float
    epsilon: float
    softplus: bool
    stride: int
    delta: bool = True

    @property
    def warps(self) -> int:
        """Warps of a block, which share its rows: a prompt's are the more worth sharing, few rows want many blocks."""
        return 4 if self.rows <= FEW_ROWS else 8

    @property
    def chunk(self) -> int:
        """Rows that are asked for together."""
        return min(self.rows, 4) if self.rows <= FEW_ROWS else 16

    @property
    def runs(self) -> int:
        return self.rows if self.rows <= FEW_ROWS else RUNS

    @property
    def columns(self) -> int:
        """Columns of a warp."""
        return next(n for n in (4, 2, 1) if self.value_dim % n == 0)

    @property
    def width(self) -> int:
        """Columns of a row of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def grid(self) -> int:
        return self.runs * self.value_heads * ceil(self.value_dim / self.columns / self.warps)

    @property
    def shared_bytes(self) -> int:
        """Two chunks: of each row q, k, the block's part of v, and four numbers."""
        of_row = 2 * ceil(self.key_dim / 4) + ceil(self.warps * self.columns / 4) + 1
        return 2 * self.chunk * 16 * of_row

    def __str__(self) -> str:
        return f"{self.warps} warps of {self.columns} columns, {self.chunk} rows"


def match_conv(call: Call, target: Target) -> Conv | None:
    if call.op not in CONVS:
        return None
    x, weight = call.inputs[:2]
    if x is None or weight is None or x.dtype != "f32" or x.tiled or not weight.constant:
        return None
    conv = Conv(**conv_sizes_of(call))
    return conv if 2 <= conv.taps <= MOST_TAPS else None


def implement_conv(call: Call, conv: Conv, target: Target) -> Implementation:
    key = f"causal_conv_source({conv!r})"
    name = f"causal_conv_m{conv.rows}_c{conv.channels}_l{conv.taps}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(conv_source, name, conv), n_threads=CONV_THREADS, dependent=True)
    inputs = tuple(Operand("input", index) for index in range(4 + conv.bias))
    kept = 4 * (conv.taps - 1) * conv.channels * (conv.rows if conv.rows <= FEW_ROWS else 1)
    n_bytes = 8 * conv.rows * conv.channels + 4 * conv.taps * conv.channels + 2 * kept
    operands = (*inputs, Operand("state"), Operand("output"))
    launch = Launch(kernel, operands, conv.grid, n_bytes, 2 * conv.rows * conv.channels * conv.taps)
    return Implementation((launch,), layouts=conv_layouts(conv.bias))


def conv_source(name: str, conv: Conv) -> str:
    """The kernel's CUDA C++."""
    bias = "const float *bias, " if conv.bias else ""
    return (
        '#include "causal_conv.cuh"\n\n'
        "struct Sizes {\n"
        f"    static constexpr int kRows = {conv.rows}, kChannels = {conv.channels}, kTaps = {conv.taps};\n"
        f"    static constexpr int kTile = {conv.tile};\n"
        f"    static constexpr int64_t kStride = {conv.stride};\n"
        f"    static constexpr bool kBias = {c_bool(conv.bias)}, kSilu = {c_bool(conv.silu)};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({CONV_THREADS})\n'
        f"{name}(const float *x, const float *weight, {bias}const int *positions, const int *slots, float *state,\n"
        "    float *y) {\n"
        f"    causal_conv<Sizes>(x, weight, {'bias' if conv.bias else 'nullptr'}, positions, slots, state, y);\n}}\n"
    )


def match_rule(call: Call, target: Target) -> DeltaRule | None:
    if call.op not in (*DELTA_RULES, SELECTIVE_RULE) or any(kind is None or kind.tiled for kind in call.inputs):
        return None
    softplus = DELTA_RULES.get(call.op, False)
    rule = DeltaRule(**sizes_of(call), softplus=softplus, delta=call.op != SELECTIVE_RULE)
    return rule if rule.key_dim <= MOST_KEY_DIM else None


def implement_rule(call: Call, rule: DeltaRule, target: Target) -> Implementation:
    key = f"delta_rule_source({rule!r})"
    shape = f"m{rule.rows}_h{rule.value_heads}_kh{rule.key_heads}_d{rule.key_dim}x{rule.value_dim}"
    name = f"delta_rule_{shape}_{short_hash(key)}"
    build = partial(rule_source, name, rule)
    kernel = Kernel(name, key, build, 32 * rule.warps, rule.shared_bytes, dependent=True)
    inputs = tuple(Operand("input", index) for index in range(5 + 2 * rule.softplus))
    elements = rule.value_heads * rule.key_dim * rule.value_dim
    n_bytes = 4 * rule.rows * (rule.width + rule.value_heads * (rule.value_dim + 2))
    n_bytes += 8 * elements * (rule.rows if rule.rows <= FEW_ROWS else 1)
    launch = Launch(
        kernel, (*inputs, Operand("state"), Operand("output")), rule.grid, n_bytes, 8 * rule.rows * elements
    )
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in (3, 4)} if rule.softplus else {})


def rule_source(name: str, rule: DeltaRule) -> str:
    """The kernel's CUDA C++."""
    sizes = {"kRows": rule.rows, "kKeyHeads": rule.key_heads, "kValueHeads": rule.value_heads}
    sizes |= {"kKeyDim": rule.key_dim, "kValueDim": rule.value_dim}
    gates = ("a", "b", "bias", "rate") if rule.softplus else ("g", "beta")
    tiling = {"kWarps": rule.warps, "kChunk": rule.chunk, "kRuns": rule.runs}
    return (
        '#include "delta_rule.cuh"\n\n'
        "struct Sizes {\n"
        f"    static constexpr int {', '.join(f'{key} = {value}' for key, value in sizes.items())};\n"
        f"    static constexpr int {', '.join(f'{key} = {value}' for key, value in tiling.items())};\n"
        f"    static constexpr int64_t kStride = {rule.stride};\n"
        f"    static constexpr float kScale = {rule.scale!r}f, kEpsilon = {rule.epsilon!r}f;\n"
        f"    static constexpr bool kSoftplus = {c_bool(rule.softplus)}, kDelta = {c_bool(rule.delta)};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * rule.warps})\n'
        f"{name}(const float *qkv, {', '.join(f'const float *{gate}' for gate in gates)},\n"
        "    const int *positions, const int *slots, float *state, float *y) {\n"
        f'    static_assert(DeltaRule<Sizes>::kShared == {rule.shared_bytes}, "what a launch asks for");\n'
        f"    delta_rule<Sizes>(qkv, {{{', '.join(gates)}}}, positions, slots, state, y);\n}}\n"
    )


RULES = (Rule("causal_conv", match_conv, implement_conv), Rule("delta_rule", match_rule, implement_rule))

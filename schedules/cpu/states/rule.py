"""Layers with a state: a short causal convolution, and the gated delta rule.

    llmc.StatefulCausalConv[Bias](x, weight[, bias], positions, slots, state)
    llmc.StatefulGatedDeltaRule(qkv, g, beta, positions, slots, state)          Yang et al. 2024, arXiv:2412.06464
    llmc.StatefulChannelDeltaRule(qkv, g, beta, positions, slots, state)        Kimi Team 2025, arXiv:2510.26692
    llmc.StatefulSelectiveRule(qkv, g, beta, positions, slots, state)        Dao and Gu 2024, arXiv:2405.21060

One launch each (kernels.py).  Channels of a convolution do not see each other, nor do columns of a rule's state
[DK, DV]: so a unit of work is some of them, and takes all rows of the step in order.  What a row leaves in its slot the
next one finds in the first level cache; a step of few rows reads and writes each state once from memory, 8 VH DK DV
bytes a row, and a prompt's chunk once for all of its rows, at 8 DK DV operations a row and head.  The order of rows is
that of the text however it is cut into steps, and so are the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Launch, Operand
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear.rule import keyed_kernel
from llmc.schedules.rule import Rule
from llmc.schedules.states_call import (
    CHANNEL_RULE,
    CONVS,
    DELTA_RULE,
    SELECTIVE_RULE,
    conv_layouts,
    conv_sizes_of,
    sizes_of,
)

COLUMNS = 32
"""Columns of a rule's state in a unit: with DK = 128 rows they take 16 KiB, which stay in a first level cache."""
CHANNELS = 64
"""Channels of a convolution in a unit."""
FEW_ROWS = 32
"""Rows of a step that may all be of other sequences; more are a prompt's."""


@dataclass(frozen=True)
class Conv:
    """rows of `channels`; taps of the weight.  stride: float32 from one slot's state to the next one's."""

    rows: int
    channels: int
    taps: int
    bias: bool
    silu: bool
    stride: int
    lanes: int

    @property
    def block(self) -> int:
        """Channels of a unit."""
        return next(n for n in range(min(CHANNELS, self.channels), 0, -1) if self.channels % n == 0)

    def __str__(self) -> str:
        return f"{self.block} channels"


@dataclass(frozen=True)
class GatedRule:
    """rows of value_heads, which share key_heads.  delta: values are news to the state, queries and keys normalised.
    stride: as of a Conv."""

    rows: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    scale: float
    delta: bool
    epsilon: float
    stride: int
    lanes: int

    @property
    def block(self) -> int:
        """Columns of a unit."""
        return next(n for n in range(min(COLUMNS, self.value_dim), 0, -1) if self.value_dim % n == 0)

    @property
    def width(self) -> int:
        """Columns of a row of queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def n_vectors(self) -> int:
        """Of DK elements that a unit keeps beside the state: queries and keys."""
        return 2

    def __str__(self) -> str:
        return f"{self.block} columns"


@dataclass(frozen=True)
class ChannelRule(GatedRule):
    """The same where each row of the state, one of the key's elements, decays by itself."""

    @property
    def n_vectors(self) -> int:
        """Queries and keys, both of them times the decay, and the decay."""
        return 5


def match_conv(call: Call, target: Target) -> Conv | None:
    if call.op not in CONVS:
        return None
    x, weight = call.inputs[:2]
    if x is None or weight is None or not weight.constant:
        return None
    return Conv(**conv_sizes_of(call), lanes=target.lanes)


def implement_conv(call: Call, conv: Conv, target: Target) -> Implementation:
    n_vectors = 2 + conv.bias
    inputs = tuple(Operand("input", index) for index in range(n_vectors + 2))
    kept = 4 * (conv.taps - 1) * conv.channels * (conv.rows if conv.rows < FEW_ROWS else 1)
    launch = Launch(
        keyed_kernel(f"conv_m{conv.rows}_c{conv.channels}_l{conv.taps}", partial(build_conv, conv)),
        (*inputs, Operand("state"), Operand("output")),
        conv.channels // conv.block,
        8 * conv.rows * conv.channels + 4 * conv.taps * conv.channels + 2 * kept,
        2 * conv.rows * conv.channels * conv.taps,
    )
    return Implementation((launch,), layouts=conv_layouts(conv.bias))


def match_rule(call: Call, target: Target) -> GatedRule | None:
    if call.op not in (DELTA_RULE, CHANNEL_RULE, SELECTIVE_RULE):
        return None
    kind = ChannelRule if call.op == CHANNEL_RULE else GatedRule
    return kind(**sizes_of(call), delta=call.op != SELECTIVE_RULE, lanes=target.lanes)


def implement_rule(call: Call, rule: GatedRule, target: Target) -> Implementation:
    inputs = tuple(Operand("input", index) for index in range(5))
    elements = rule.value_heads * rule.key_dim * rule.value_dim
    n_gates = rule.value_heads * (1 + (rule.key_dim if isinstance(rule, ChannelRule) else 1))
    kind = "channel_delta" if isinstance(rule, ChannelRule) else "delta" if rule.delta else "selective"
    shape = f"m{rule.rows}_h{rule.value_heads}_kh{rule.key_heads}_d{rule.key_dim}x{rule.value_dim}"
    launch = Launch(
        keyed_kernel(f"{kind}_rule_{shape}", partial(build_rule, rule)),
        (*inputs, Operand("state"), Operand("output"), Operand("scratch")),
        rule.value_heads * (rule.value_dim // rule.block),
        4 * rule.rows * (rule.width + rule.value_heads * rule.value_dim + n_gates)
        + 8 * elements * (rule.rows if rule.rows < FEW_ROWS else 1),
        (8 if rule.delta else 6) * rule.rows * elements,
    )
    return Implementation((launch,), scratch_bytes=4 * (rule.n_vectors * rule.key_dim + rule.block))


def build_conv(conv: Conv) -> Any:
    from llmc.schedules.cpu.states import kernels  # TVM is imported only when something is compiled

    return kernels.conv_kernel(conv)


def build_rule(rule: GatedRule) -> Any:
    from llmc.schedules.cpu.states import kernels

    return kernels.rule_kernel(rule)


RULES = (Rule("causal_conv", match_conv, implement_conv), Rule("gated_rule", match_rule, implement_rule))

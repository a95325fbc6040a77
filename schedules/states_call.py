"""What the calls of layers with a state say, for the schedules of every target."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from llmc.compiler.kernel import Call, Layout, RowMajor

DELTA_RULE = "llmc.StatefulGatedDeltaRule"
DELTA_RULES = {DELTA_RULE: False, f"{DELTA_RULE}Softplus": True}
"""Delta rules, and whether each works out its own gates."""
CHANNEL_RULE = "llmc.StatefulChannelDeltaRule"
"""A delta rule whose state decays by another factor for each of the key's elements."""
SELECTIVE_RULE = "llmc.StatefulSelectiveRule"
SELECTIVE_SCAN = "llmc.StatefulSelectiveScan"
CONVS = {"llmc.StatefulCausalConv": False, "llmc.StatefulCausalConvBias": True}
"""Convolutions, and whether each has a bias."""


def is_stateful(call: Call) -> bool:
    return call.op in (*DELTA_RULES, CHANNEL_RULE, SELECTIVE_RULE, SELECTIVE_SCAN) or call.op in CONVS


def sizes_of(call: Call) -> dict[str, Any]:
    """What a rule's call says of its rows, heads and state, by the names that schedules have for it; stride: float32
    from one slot's state to the next one's."""
    qkv = call.inputs[0]
    assert qkv is not None
    return {
        "rows": qkv.shape[0],
        "key_heads": call.attribute("num_k_heads"),
        "value_heads": call.attribute("num_v_heads"),
        "key_dim": call.attribute("key_dim"),
        "value_dim": call.attribute("value_dim"),
        "scale": call.attribute("scale"),
        "epsilon": call.attribute("epsilon", 0.0),
        "stride": call.attribute("slot_bytes") // 4,
    }


def conv_sizes_of(call: Call) -> dict[str, Any]:
    """The same of a convolution's rows, channels, weight and state."""
    x, weight = call.inputs[:2]
    assert x is not None
    assert weight is not None
    return {
        "rows": x.shape[0],
        "channels": x.shape[1],
        "taps": weight.shape[1],
        "bias": CONVS[call.op],
        "silu": bool(call.attribute("silu")),
        "stride": call.attribute("slot_bytes") // 4,
    }


def scan_sizes_of(call: Call) -> dict[str, int]:
    """The same of a scan's rows, channels and state."""
    x, rate = call.inputs[0], call.inputs[5]
    assert x is not None
    assert rate is not None
    return {
        "rows": x.shape[0],
        "channels": x.shape[1],
        "size": rate.shape[1],
        "stride": call.attribute("slot_bytes") // 4,
    }


@dataclass(frozen=True)
class ByTap:
    """Weights [C, L] of a convolution in float32, tap by tap: [L, C]."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * prod(shape)

    def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(array.T, dtype=np.float32)

    def __str__(self) -> str:
        return "f32 by tap"


def conv_layouts(bias: bool) -> dict[int, Layout]:
    """How a convolution's weight and bias lie in an artifact."""
    return {1: ByTap(), 2: RowMajor("f32")} if bias else {1: ByTap()}

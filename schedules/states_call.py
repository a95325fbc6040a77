"""What the calls of layers with a state say, for the schedules of every target."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from llmc.compiler.kernel import Call

DELTA_RULE = "llmc.StatefulGatedDeltaRule"
DELTA_RULES = {DELTA_RULE: False, f"{DELTA_RULE}Softplus": True}
"""Whether it works out its own gates."""
SELECTIVE_RULE = "llmc.StatefulSelectiveRule"
CONVS = {"llmc.StatefulCausalConv": False, "llmc.StatefulCausalConvBias": True}
"""Whether it has a bias."""


def is_stateful(call: Call) -> bool:
    return call.op in (*DELTA_RULES, SELECTIVE_RULE) or call.op in CONVS


@dataclass(frozen=True)
class ByTap:
    """Weights [C, L] of a convolution in float32, tap by tap: [L, C]."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * prod(shape)

    def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(array.T, dtype=np.float32)

    def __str__(self) -> str:
        return "f32 by tap"

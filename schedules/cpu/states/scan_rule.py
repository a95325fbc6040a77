"""Layers that scan: each channel has a state, and all channels of a token share what goes in and what is asked.

    llmc.StatefulSelectiveScan(x, dt, gate, b, c, rate, bias, skip, positions, slots, state)
                                                                            Gu and Dao 2023, arXiv:2312.00752

One launch (scan_kernel.py).  Lanes are channels, so that sums over a state are of vectors and b and c are broadcast; a
unit of work is a block of channels, and takes all rows of the step in order, as in rule.py.  A row of C channels with
N states each costs C N exponentials, about 17 operations on vectors for each of which one is read from memory and
written back: of a state [C, N] a step of few rows reads and writes 8 C N bytes a row, and a prompt's chunk once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np

from llmc.compiler.kernel import Call, Implementation, Launch, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear.rule import keyed_kernel
from llmc.schedules.cpu.states.rule import FEW_ROWS
from llmc.schedules.rule import Rule
from llmc.schedules.states_call import SELECTIVE_SCAN, scan_sizes_of

CHANNELS = 64
"""Channels in a unit: with N = 16 their states and rates take 8 KiB, which stay in a first level cache."""


@dataclass(frozen=True)
class Scan:
    """rows of `channels`, with a state of `size` each.  stride: float32 from one slot's state to the next one's."""

    rows: int
    channels: int
    size: int
    stride: int
    lanes: int

    @property
    def block(self) -> int:
        """Channels of a unit."""
        return channels_of_unit(self.channels)

    def __str__(self) -> str:
        return f"{self.block} channels"


@dataclass(frozen=True)
class ByUnit:
    """Rates [C, N] in float32, by unit and then by state: [C / block][N][block], times log2(e)."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * prod(shape)

    def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        channels, size = array.shape
        units = array.astype(np.float32).reshape(-1, channels_of_unit(channels), size)
        return np.ascontiguousarray(units.swapaxes(1, 2) * np.float32(math.log2(math.e)))

    def __str__(self) -> str:
        return "f32 by unit"


def channels_of_unit(channels: int) -> int:
    return next(n for n in range(min(CHANNELS, channels), 0, -1) if channels % n == 0)


def match(call: Call, target: Target) -> Scan | None:
    if call.op != SELECTIVE_SCAN or any(value is None or not value.constant for value in call.inputs[5:8]):
        return None
    return Scan(**scan_sizes_of(call), lanes=target.lanes)


def implement(call: Call, scan: Scan, target: Target) -> Implementation:
    inputs = tuple(Operand("input", index) for index in range(10))
    elements, vectors = scan.channels * scan.size, scan.rows * scan.channels
    launch = Launch(
        keyed_kernel(f"selective_scan_m{scan.rows}_c{scan.channels}x{scan.size}", partial(build, scan)),
        (*inputs, Operand("state"), Operand("output")),
        scan.channels // scan.block,
        16 * vectors + 8 * scan.rows * scan.size + elements * (4 + 8 * (scan.rows if scan.rows < FEW_ROWS else 1)),
        20 * scan.rows * elements,
    )
    return Implementation((launch,), layouts={5: ByUnit(), 6: RowMajor("f32"), 7: RowMajor("f32")})


def build(scan: Scan) -> Any:
    from llmc.schedules.cpu.states import scan_kernel  # TVM is imported only when something is compiled

    return scan_kernel.scan_kernel(scan)


RULES = (Rule("selective_scan", match, implement),)

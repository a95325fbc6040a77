"""Selective scans on a GPU, over the slots of a step's sequences (include/selective_scan.cuh, state_rows.cuh).

A state lies in its slot in float32, as rates lie: [C, N], so that what a warp reads of either is one piece.  Sums have
one order, whatever the step's rows: a row has the same bits however a prompt is cut and whoever stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, gcd

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.states.rule import FEW_ROWS, RUNS
from llmc.schedules.rule import Rule
from llmc.schedules.states_call import SELECTIVE_SCAN, scan_sizes_of

WARPS = 2
MOST_LANES, MOST_OWN = 4, 32
"""The most lanes that share a channel, and the most states that each of them keeps in registers."""


@dataclass(frozen=True)
class Scan:
    """rows of `channels`, with a state of `size` each.  stride: float32 from one slot's state to the next one's."""

    rows: int
    channels: int
    size: int
    stride: int

    @property
    def lanes(self) -> int:
        """Lanes that share a channel."""
        return gcd(self.size, MOST_LANES)

    @property
    def runs(self) -> int:
        """Sequences that blocks take side by side."""
        return self.rows if self.rows <= FEW_ROWS else RUNS

    @property
    def grid(self) -> int:
        return self.runs * ceil(self.channels / (32 * WARPS // self.lanes))

    def __str__(self) -> str:
        return f"{WARPS} warps, {self.lanes} lanes a channel"


def match(call: Call, target: Target) -> Scan | None:
    if call.op != SELECTIVE_SCAN or any(kind is None or kind.tiled for kind in call.inputs):
        return None
    if not all(kind is not None and kind.constant for kind in call.inputs[5:8]):
        return None
    scan = Scan(**scan_sizes_of(call))
    return scan if scan.size <= scan.lanes * MOST_OWN else None


def implement(call: Call, scan: Scan, target: Target) -> Implementation:
    key = f"scan_source({scan!r})"
    name = f"selective_scan_m{scan.rows}_c{scan.channels}x{scan.size}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(scan_source, name, scan), 32 * WARPS, dependent=True)
    operands = (*(Operand("input", index) for index in range(10)), Operand("state"), Operand("output"))
    elements = scan.channels * scan.size
    n_bytes = 16 * scan.rows * scan.channels + 8 * scan.rows * scan.size + 4 * elements
    n_bytes += 8 * elements * (scan.rows if scan.rows <= FEW_ROWS else 1)
    launch = Launch(kernel, operands, scan.grid, n_bytes, 20 * scan.rows * elements)
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in (5, 6, 7)})


def scan_source(name: str, scan: Scan) -> str:
    """The kernel's CUDA C++."""
    sizes = {"kRows": scan.rows, "kChannels": scan.channels, "kStates": scan.size}
    sizes |= {"kLanes": scan.lanes, "kWarps": WARPS, "kRuns": scan.runs}
    floats = ("x", "dt", "gate", "b", "c", "rate", "bias", "skip")
    return (
        '#include "selective_scan.cuh"\n\n'
        "struct Sizes {\n"
        f"    static constexpr int {', '.join(f'{key} = {value}' for key, value in sizes.items())};\n"
        f"    static constexpr int64_t kStride = {scan.stride};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * WARPS})\n'
        f"{name}({', '.join(f'const float *{operand}' for operand in floats)},\n"
        "    const int *positions, const int *slots, float *state, float *y) {\n"
        f"    selective_scan<Sizes>({', '.join(floats)}, positions, slots, state, y);\n}}\n"
    )


RULES = (Rule("selective_scan", match, implement),)

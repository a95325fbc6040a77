"""Small kernels with known answers, for what an emulator can be wrong about: how descriptors and swizzles are read, in
which order copies arrive and phases turn, that a launch waits for the one before.  The kernels: micro/*.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.bench.gpu import bits
from llmc.bench.gpu.bits import Array, exact
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.inputs import normal
from llmc.bench.gpu.kit import Kit

STAGE = "micro"
TIMES = 20
"""Each is run so often: what goes wrong seldom should show."""


@dataclass(frozen=True)
class Micro:
    """A kernel of micro/NAME.cu.  buffers: what each pointer holds at the start.  answers: for some buffers, by index,
    what they hold at the end (f32, or u32 exactly).  launches: one after the other, as `dependent` launches, and again
    as a graph of them."""

    name: str
    n_threads: int
    shared_bytes: int
    grid: int
    make: Callable[[int], tuple[list[Array], dict[int, Array]]]
    launches: int = 1


def pipeline(seed: int) -> tuple[list[Array], dict[int, Array]]:
    x = normal(f"pipeline {seed}", (37, 128))
    return [x, np.zeros(128, np.float32)], {1: x.sum(0)}


def product(seed: int) -> tuple[list[Array], dict[int, Array]]:
    a, b = (exact(normal(f"product {name} {seed}", (64, 128)), "bf16") for name in "ab")
    return [bits.tiled(a, "bf16"), bits.tiled(b, "bf16"), np.zeros((64, 64), np.float32)], {2: a @ b.T}


def turned(seed: int) -> tuple[list[Array], dict[int, Array]]:
    a, v = (exact(normal(f"turned {name} {seed}", (64, 64)), "bf16") for name in "av")
    out, offset = np.zeros((64, 64), np.float32), np.zeros(1, np.uint32)
    return [a, bits.bits_of(v, "bf16"), out, out, out, offset + 1], {2: a @ v, 3: a @ v, 4: a @ v.T, 5: offset}


def order(seed: int) -> tuple[list[Array], dict[int, Array]]:
    halves = np.arange(seed, seed + 2 * ORDER_BLOCKS * 128, dtype=np.uint64).reshape(2, ORDER_BLOCKS, 128)
    step, zero = np.arange(seed, 128 + seed, dtype=np.uint32), np.zeros(1, np.uint32)
    buffers = [step, halves.astype(np.uint32), zero, zero]
    for turn in range(ORDER_LAUNCHES):
        halves[(turn + 1) % 2] = (3 * np.roll(halves[turn % 2], -1, axis=0) + step) % 2**32
    return buffers, {1: halves.astype(np.uint32), 2: zero + np.uint32(ORDER_LAUNCHES), 3: zero}


def counter(seed: int) -> tuple[list[Array], dict[int, Array]]:
    x = normal(f"counter {seed}", (COUNTER_BLOCKS, 128))
    zero = np.zeros(1, np.uint32)
    buffers = [x, np.zeros_like(x), zero, np.zeros(128, np.float32)]
    return buffers, {1: 2 * x, 2: zero, 3: 2 * x.sum(0)}


def multicast(seed: int) -> tuple[list[Array], dict[int, Array]]:
    w, x = normal(f"multicast w {seed}", (MULTICAST_BLOCKS, 37, 128)), normal(f"multicast x {seed}", (37, 256))
    return [w, x, np.zeros((MULTICAST_BLOCKS, 128), np.float32)], {2: (w * (x[:, :128] - x[:, 128:])).sum(1)}


def exchange(seed: int) -> tuple[list[Array], dict[int, Array]]:
    x = normal(f"exchange {seed}", (MULTICAST_BLOCKS, 37, 128))
    swapped = x.sum(1).reshape(-1, 2, 128)[:, ::-1].reshape(-1, 128)
    return [x, np.zeros((MULTICAST_BLOCKS, 128), np.float32)], {1: swapped}


def fragments(seed: int) -> tuple[list[Array], dict[int, Array]]:
    a, b = (exact(normal(f"fragments {n} {seed}", (n, 16)), "bf16") for n in (16, 8))
    out = np.zeros((16, 8), np.float32)
    return [*(bits.bits_of(x, "bf16") for x in (a, b)), out, out], {2: a @ b.T, 3: a @ b.T}


ORDER_BLOCKS, ORDER_LAUNCHES, COUNTER_BLOCKS, MULTICAST_BLOCKS = 264, 50, 500, 132
MICROS = {
    micro.name: micro
    for micro in (
        Micro("pipeline", 160, 3 * 512 + 6 * 8, 1, pipeline),
        Micro("product", 128, 32768 + 16, 1, product),
        Micro("turned", 128, 16384, 1, turned),
        Micro("order", 128, 0, ORDER_BLOCKS, order, ORDER_LAUNCHES),
        Micro("counter", 128, 0, COUNTER_BLOCKS, counter),
        Micro("multicast", 256, 3 * 3 * 512 + 6 * 8, MULTICAST_BLOCKS, multicast),
        Micro("exchange", 128, 2 * 512 + 2 * 8, MULTICAST_BLOCKS, exchange),
        Micro("fragments", 32, 768, 1, fragments),
    )
}


def items(kit: Kit) -> Iterator[str]:
    yield from (name for name in MICROS if f"micro_{name}" in kit.said["kernels"])


def runner(device: Device, kit: Kit) -> Callable[[str], dict[str, Any]]:
    """run(name) -> what was found; raises ValueError for a wrong answer."""

    def run(name: str) -> dict[str, Any]:
        for seed in range(kit.said["settings"]["micro_times"]):
            with device.kept():
                check(device, kit, MICROS[name], seed)
        return {"times": kit.said["settings"]["micro_times"]}

    return run


def check(device: Device, kit: Kit, micro: Micro, seed: int) -> None:
    full_name = f"micro_{micro.name}"
    kernel = device.kernel(kit.cubin(full_name), full_name, **kit.kernel(full_name))
    places = [device.allocate(buffer.nbytes) for buffer in micro.make(seed)[0]]

    def launch_all() -> None:
        for _ in range(micro.launches):
            device.launch(kernel, micro.grid, places)

    def give(seed: int) -> dict[int, Array]:
        buffers, answers = micro.make(seed)
        for place, buffer in zip(places, buffers, strict=True):
            device.write(place, buffer)
        return answers

    answers = give(2 * seed)
    launch_all()
    compare(device, places, answers)
    if micro.launches > 1:
        answers = give(2 * seed + 1)
        with device.graph(launch_all) as replay:
            replay()
        compare(device, places, answers)


def compare(device: Device, places: list[int], answers: dict[int, Array]) -> None:
    device.wait()
    for index, expected in answers.items():
        found = device.read(places[index], expected.nbytes).view(expected.dtype).reshape(expected.shape)
        near = np.abs(expected.astype(np.float64)).max() * 1e-5 if expected.dtype == np.float32 else 0
        wrong = ~(np.abs(found.astype(np.float64) - expected) <= near)
        if wrong.any():
            first = np.argwhere(wrong)[0].tolist()
            raise ValueError(f"operand {index}: {int(wrong.sum())} of {wrong.size} are wrong, the first at {first}")

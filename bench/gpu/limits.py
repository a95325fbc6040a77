"""What the device can do at best, measured in the same run: bytes a second of copies, operations a second of cuBLAS,
and what a launch costs that has next to nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from llmc.bench.gpu.driver import Device, Kernel
from llmc.bench.gpu.facts import BUSY, answered, smi
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from llmc.schedules.tuning import limits as tune_limits

STAGE = "limits"
COPY, TORCH_COPY, PRODUCT, LAUNCH = "copy", "copy by PyTorch", "cuBLAS bf16", "launch"
SUSTAINED = "cuBLAS bf16 sustained"
COPY_LIMIT, PRODUCT_LIMIT = tune_limits.COPY, tune_limits.PRODUCT
TIMES, TOGETHER = 7, 5
LATE = 0.5
"""The last part of a sustained run, which alone counts: clocks have settled by then."""


def items(kit: Kit) -> Iterator[str]:
    yield from (COPY, TORCH_COPY, LAUNCH)
    yield from (f"{PRODUCT} {'x'.join(map(str, shape))}" for shape in kit.said["settings"]["products"])
    yield SUSTAINED


def runner(device: Device, kit: Kit) -> Callable[[str], dict[str, Any]]:
    """run(item) -> GB/s, GFLOP/s, or µs."""

    def run(name: str) -> dict[str, Any]:
        n_bytes = kit.said["settings"]["copy_bytes"]
        if name == COPY:
            return copy(device, n_bytes)
        if name == TORCH_COPY:
            return torch_copy(n_bytes)
        if name == LAUNCH:
            return launch(device, kit)
        if name == SUSTAINED:
            return sustained(kit.said["settings"]["products"][0], kit.said["settings"]["sustained_s"])
        m, n, k = map(int, name.removeprefix(f"{PRODUCT} ").split("x"))
        return product(m, n, k)

    return run


def copy(device: Device, n_bytes: int) -> dict[str, Any]:
    """Bytes read and written by the driver's copy within the device."""
    with device.kept():
        source, target = device.allocate(n_bytes), device.allocate(n_bytes)
        device.fill(source, 1, n_bytes)
        device.fill(target, 2, n_bytes)
        times = device.times_ms(lambda: device.copy(target, source, n_bytes), TIMES)
    seconds = median(times) / 1e3
    return {"gb_per_s": 2 * n_bytes / seconds / 1e9 if seconds else None}


def torch_copy(n_bytes: int) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * n_bytes / seconds_of(lambda: target.copy_(source)) / 1e9}


LAUNCH_BLOCKS = 132


def launch(device: Device, kit: Kit) -> dict[str, Any]:
    """µs of each of many launches in a graph, where each waits for the one before, and where it may begin early."""
    name, n_launches = "micro_order", kit.said["settings"]["launches"]
    kernel = device.kernel(kit.cubin(name), name, **kit.kernel(name))
    found = {}
    with device.kept():
        places = [device.upload(np.zeros(n, np.uint32)) for n in (128, 2 * 128 * LAUNCH_BLOCKS, 1, 1)]
        for said, each in (("us", replace(kernel, dependent=False)), ("early_us", kernel)):

            def record(each: Kernel = each) -> None:
                for _ in range(n_launches):
                    device.launch(each, LAUNCH_BLOCKS, places)

            with device.graph(record) as replay:
                found[said] = 1e3 * median(device.times_ms(replay, TIMES)) / n_launches
    return found


def product(m: int, n: int, k: int) -> dict[str, Any]:
    seconds = seconds_of(multiplication(m, n, k))
    return {"gflop_per_s": 2 * m * n * k / seconds / 1e9, "us": 1e6 * seconds}


def multiplication(m: int, n: int, k: int) -> Callable[[], Any]:
    """x [m, k] times a weight [n, k], bf16, of normal numbers: zeros would be faster than what models have."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    return lambda: x @ weight.T


def sustained(shape: Sequence[int], seconds: float) -> dict[str, Any]:
    """The same for as long as some long prompts take: a card that draws all its power turns its clock down, for
    cuBLAS as for others.  While it runs, nvidia-smi says what the clock is, and why.  No limit: the best is one."""
    import time

    m, n, k = shape
    multiply = multiplication(m, n, k)
    asked, began = smi(BUSY), time.perf_counter()
    times: list[float] = []
    while not times or time.perf_counter() - began < seconds:
        times.append(together_s(multiply))
    late = times[int(LATE * len(times)) :]
    return {
        "sustained_gflop_per_s": 2 * m * n * k / median(late) / 1e9,
        "products": TOGETHER * len(times),
        "clocks": asked and answered(asked),
    }


def seconds_of(work: Callable[[], Any]) -> float:
    """The median of some runs, after three that do not count."""
    return median([together_s(work) for _ in range(TIMES + 3)][3:])


def together_s(work: Callable[[], Any]) -> float:
    """Of one of some in a row: the host's part of one alone would show."""
    import time

    import torch

    began = time.perf_counter()
    for _ in range(TOGETHER):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / TOGETHER


def said(journal: Journal) -> Iterator[str]:
    """What a long run came to, in words."""
    if long := journal.results(STAGE).get(SUSTAINED):
        rate, clocks = long["sustained_gflop_per_s"], long["clocks"]
        yield f"{SUSTAINED}: {rate:,.0f} G/s over {long['products']} products; {BUSY}: {clocks or 'not known'}"


def found(journal: Journal) -> dict[str, float]:
    """The best of each kind so far, in bytes and operations a second; empty where nothing is measured."""
    results = journal.results(STAGE).values()
    rates: dict[str, float] = {}
    for name, key in ((COPY_LIMIT, "gb_per_s"), (PRODUCT_LIMIT, "gflop_per_s")):
        if known := [1e9 * entry[key] for entry in results if entry.get(key)]:
            rates[name] = max(known)
    return rates

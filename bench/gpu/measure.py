"""How long every candidate takes, on memory that no cache holds.

A CUDA graph launches the candidate many times, each time over another copy of its weights (of attention: another
layer's part of the cache), so that together they are several times the L2; activations are warm, as they are in a
model.  The graph is replayed; the median replay counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from llmc.bench.gpu import bits
from llmc.bench.gpu.check import is_used_first, order, tolerance
from llmc.bench.gpu.check import item as check_item
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.inputs import normal
from llmc.bench.gpu.kit import LAYOUTS, Candidate, Job, Kit
from llmc.bench.gpu.memory import launches, output_values
from llmc.compiler.kernel import PAGE_TOKENS, Operand, TensorType
from llmc.schedules.attention_call import LATENT, input_places

STAGE = "tune"
POOL_BYTES = 32 << 20
COLD = 4
"""The copies together are so many times the L2."""
SHORTEST_MS = 1.0
MOST_LAUNCHES = 400
REPLAYS = 7
SHARE_OF_MEMORY = 0.6
MOST_COMPARED_BYTES = 8 << 20
"""Results of more bytes are not compared: they are those of prompts, and take longer to read than to make."""


@dataclass(frozen=True)
class Size:
    """How much is measured.  l2_bytes: of the device.  shortest_ms: of a replay."""

    l2_bytes: int
    shortest_ms: float = SHORTEST_MS
    replays: int = REPLAYS


def item(job: Job, index: int, length: int) -> str:
    return f"{job.name} @{length} #{index}" if length else f"{job.name} #{index}"


def items(kit: Kit) -> Iterator[str]:
    """All jobs' own choices first, then what is second on paper, …; jobs in the order in which they are checked."""
    jobs = sorted((job for job in kit.jobs.values() if job.signature and not job.of_chain), key=order)
    for index in range(max((len(job.candidates) for job in jobs), default=0)):
        for job in jobs:
            if index < len(job.candidates):
                yield from (item(job, index, length) for length in job.lengths or (0,))


def is_own_at_first(kit: Kit, name: str) -> bool:
    job, index, _ = find(kit, name)
    return is_used_first(kit, check_item(job, index))


def find(kit: Kit, name: str) -> tuple[Job, int, int]:
    rest, _, index = name.rpartition(" #")
    job, _, length = rest.rpartition(" @")
    return (kit.jobs[job], int(index), int(length)) if job else (kit.jobs[rest], int(index), 0)


def runner(device: Device, kit: Kit, size: Size) -> Callable[[str], dict[str, Any]]:
    """run(item) -> µs and what a record says besides; raises ValueError where there is no room, and where a candidate
    gives another result than the first that was measured of its call."""
    random, first = Random(device), First()

    def run(name: str) -> dict[str, Any]:
        job, index, length = find(kit, name)
        candidate = job.candidates[index]
        with device.kept():
            copies = [random.places(job, candidate, length, i) for i in random.copies(job, candidate, length, size)]
            us, n = time_us(device, [launches(device, kit, candidate, places) for places in copies], size)
            first.compare(job, length, device, copies[0][Operand("output", 0)])
        n_bytes, n_operations = work(job, candidate, length)
        return {
            "us": us,
            "launches": n,
            "copies": len(copies),
            "signature": job.signature,
            "rule": job.rule,
            "params": candidate.params,
            "words": candidate.words,
            "own": index == 0,
            "length": length,
            "bytes": n_bytes,
            "operations": n_operations,
        }

    return run


class First:
    """The results of the candidates that were measured first, which those of the others must be like."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], bits.Array] = {}

    def compare(self, job: Job, length: int, device: Device, output: int) -> None:
        """output: the address of the result; all candidates of a call and length had the same operands."""
        kind = job.call.outputs[0]
        if kind.n_bytes > MOST_COMPARED_BYTES:
            return
        y = output_values(job.call, device.read(output, kind.n_bytes))
        known = self._known.setdefault((job.name, length), y)
        if not np.isfinite(known).all():  # random bits may be no number as a scale
            return
        largest = float(np.abs(known).max()) or 1.0
        error = float(np.abs(y - known).max()) / largest
        if not error <= 2 * tolerance(job):
            raise ValueError(f"another result than the first candidate's, by {error:.3g} of the largest")


def time_us(device: Device, copies: list[Callable[[], None]], size: Size) -> tuple[float, int]:
    """Of one run, and how many a replay has."""

    def once() -> None:
        for run in copies:
            run()

    once()
    device.wait()
    each_ms = max(min(device.times_ms(once, 2)) / len(copies), 1e-3)
    n_rounds = max(1, min(MOST_LAUNCHES // len(copies), round(size.shortest_ms / each_ms / len(copies))))

    def record() -> None:
        for _ in range(n_rounds):
            once()

    with device.graph(record) as replay:
        times = device.times_ms(replay, size.replays + 1)[1:]
    n = n_rounds * len(copies)
    return 1e3 * median(times) / n, n


def work(job: Job, candidate: Candidate, length: int) -> tuple[int, int]:
    """Bytes that must move and operations: of attention, for contexts of this length."""
    if not job.is_attention:
        return candidate.n_bytes, candidate.n_operations
    call, m = job.call, job.call.outputs[0].shape[0]
    kinds = [kind for kind in (*call.inputs[:1], *call.outputs[:1]) if kind is not None]
    runs = length * m if is_decode(m) else length  # a prompt's rows share their context
    attended = length * m if is_decode(m) else m * length - m * m // 2
    n_bytes = runs * candidate.kv_layer_bytes // PAGE_TOKENS + sum(kind.n_bytes for kind in kinds)
    width = 2 * call.attribute("head_dim")  # of a key and a value
    if call.op == LATENT:
        width = 2 * call.attribute("latent_dim") + call.attribute("rotary_dim")
    return n_bytes, 2 * attended * call.attribute("num_heads") * width


def is_decode(m: int) -> bool:
    """Whether a step of m rows is measured as m sequences; else as a part of one prompt."""
    return m <= 64


class Random:
    """Memory filled with finite random numbers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        n = POOL_BYTES // 2
        self._pool = device.upload(bits.bits_of(normal("pool", (64, n // 64)) * np.float32(0.02), "bf16"))

    def bytes(self, n_bytes: int, pool: int | None = None) -> int:
        """pool: of POOL_BYTES to copy from, if not normal numbers in bf16."""
        address = self._device.allocate(n_bytes)
        for start in range(0, n_bytes, POOL_BYTES):
            self._device.copy(address + start, pool or self._pool, min(POOL_BYTES, n_bytes - start))
        return address

    def copies(self, job: Job, candidate: Candidate, length: int, size: Size) -> range:
        """Copies of what must be cold; for attention, layers of one cache, as many as the model has."""
        self._shared: dict[Operand, int] = {}
        call = job.call
        if job.is_attention:
            n_layers = call.attribute("n_layers")
            n_bytes = n_cached_pages(job, length) * candidate.kv_layer_bytes * n_layers
            self.make_room(n_bytes)
            self._shared[Operand("kv")] = self.bytes(n_bytes)
            return range(n_layers)
        n = max(2, -(-COLD * size.l2_bytes // max(weight_bytes(job, candidate), 1)))
        return range(min(n, MOST_LAUNCHES))

    def make_room(self, n_bytes: int) -> None:
        """Raises ValueError where there is not so much."""
        free = self._device.facts()["free_bytes"]
        if n_bytes > SHARE_OF_MEMORY * free:
            raise ValueError(f"it would take {n_bytes / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free")

    def places(self, job: Job, candidate: Candidate, length: int, copy: int) -> dict[Operand, int]:
        """Addresses of the operands; all but what must be cold is the same for all copies."""
        call = job.call
        if not any(operand.kind == "output" for operand in self._shared):
            self._fill_shared(job, candidate, length)
        places = dict(self._shared)
        if job.is_attention:
            places[Operand("kv")] += copy * candidate.kv_layer_bytes
        for index, kind in enumerate(call.inputs):
            if kind is not None and kind.constant:
                places[Operand("input", index)] = self.bytes(constant_bytes(kind, candidate.layouts.get(index)))
        return places

    def _fill_shared(self, job: Job, candidate: Candidate, length: int) -> None:
        device, call, shared = self._device, job.call, self._shared
        for index, output in enumerate(call.outputs):
            shared[Operand("output", index)] = device.allocate(output.n_bytes)
        for index, n_bytes in enumerate(candidate.temps):
            shared[Operand("temp", index)] = device.allocate(n_bytes)
        if candidate.scratch_bytes:
            shared[Operand("scratch")] = device.allocate(candidate.scratch_bytes)
            device.fill(shared[Operand("scratch")], 0, candidate.scratch_bytes)
        ids = step_ids(job, length) if job.is_attention else {}
        for index, kind in enumerate(call.inputs):
            if index in ids:
                shared[Operand("input", index)] = device.upload(ids[index])
            elif kind is not None and not kind.constant and not is_cache(job, index):
                shared[Operand("input", index)] = self.bytes(kind.n_bytes)


def is_cache(job: Job, index: int) -> bool:
    return job.is_attention and index >= len(job.call.inputs) - 2


def weight_bytes(job: Job, candidate: Candidate) -> int:
    """Bytes of all constants of the call, in the candidate's layouts."""
    kinds = enumerate(job.call.inputs)
    return sum(constant_bytes(kind, candidate.layouts.get(index)) for index, kind in kinds if kind)


def constant_bytes(kind: TensorType, layout: dict[str, Any] | None) -> int:
    """Bytes that a constant takes in its layout; 0 for what is none."""
    if not kind.constant:
        return 0
    if layout is None or layout["kind"] not in LAYOUTS:
        return 4 * int(np.prod(kind.shape))
    fields = {name: value for name, value in layout.items() if name != "kind"}
    return int(LAYOUTS[layout["kind"]](**fields).n_bytes(kind.shape))


def n_cached_pages(job: Job, length: int) -> int:
    m = job.call.outputs[0].shape[0]
    return -(-length // PAGE_TOKENS) * (m if is_decode(m) else 1)


def step_ids(job: Job, length: int) -> dict[int, bits.Array]:
    """positions and page_table: m sequences' last tokens, or the last m tokens of one prompt; pages are shuffled."""
    at = input_places(job.call)["positions"]
    table_kind = job.call.inputs[at + 1]
    assert table_kind is not None
    m, columns = table_kind.shape
    n_own, n_pages = -(-length // PAGE_TOKENS), n_cached_pages(job, length)
    pages = np.random.default_rng(0).permutation(n_pages).astype(np.int32).reshape(-1, n_own)
    table = np.full((m, columns), -1, np.int32)
    table[:, :n_own] = pages
    decode = is_decode(m)
    positions = np.full(m, length - 1, np.int32) if decode else np.arange(length - m, length, dtype=np.int32)
    return {at: positions, at + 1: table}

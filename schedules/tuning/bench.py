"""Times kernels where they will run: on the runtime's own threads, with weights that no cache holds (bench.c).

    with Bench(target, n_threads) as bench:
        times = bench.rounds([layer.subject(bench) …, bench.reading()], n_rounds=9)

What is compared is measured in turns within one parallel region, the order turning from round to round, so that all
see the same machine.  The limits of the machine are subjects like the kernels.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmc.compiler import link
from llmc.compiler.kernel import Call, Operand, RowMajor, numpy_dtype
from llmc.compiler.target import Target, tiles_allowed
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache
from llmc.schedules.execute import Array, Executable

SOURCE = Path(__file__).with_name("bench.c")
READ_BYTES, ROUNDS, CHAINS = 1 << 16, 4096, 12
"""As in bench.c: bytes of a unit of reading; instructions of a unit of multiply-adds, ROUNDS * CHAINS."""

ARENA_BYTES = 512 << 20
"""Weights lie here one after another, far more than caches hold; a larger weight has it for itself."""
READING_BYTES = 32 << 20
MULTIPLYING_UNITS = 64
SHORTEST_NS = 500_000
"""A sample has as many runs as fill this time."""
MOST_RUNS = 500
PATIENCE = 3
"""How many times the rounds asked for are measured, when the machine is loaded."""
MULTIPLY_ADDS = {"fma256": 8, "fma512": 16, "dpbf16": 32, "vpdpbusd": 64, "tdpbf16ps": 512, "tdpbsud": 1024}
"""Instructions whose rate is measured, and the multiply-adds of each; of AMX's for one of sixteen rows."""


BUSY = 0.97
"""A sample is clean if its threads had processors for at least this part of its time."""


@dataclass(frozen=True)
class Sample:
    """ns: of one run.  busy: for how much of that the threads had processors, on average: a thread that another
    program, or its own sleep, keeps from one leaves its work to the others."""

    ns: float
    busy: float = 1.0

    @property
    def clean(self) -> bool:
        return self.busy >= BUSY


@dataclass
class Launched:
    """A kernel's address, its grid, and for each operand thread 0's pointer and the step to the next thread's."""

    function: int
    grid: int
    pointers: list[int]
    strides: list[int]


@dataclass
class Subject:
    """What is timed: `launches(i)` of the i-th run.  n: bytes or operations of a run, for a limit."""

    launches: Callable[[int], list[Launched]]
    runs: int = 1
    n: int = 0


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("n_pointers", ctypes.c_uint32),
        ("grid", ctypes.c_uint32),
        ("pointers", ctypes.POINTER(ctypes.c_uint64)),
        ("strides", ctypes.POINTER(ctypes.c_uint64)),
    )


class _Stamp(ctypes.Structure):
    _fields_ = (("time_ns", ctypes.c_int64), ("busy_ns", ctypes.c_int64))


class Bench:
    """The runtime's threads and memory for weights.  n_threads 0: as many as this process may use."""

    def __init__(self, target: Target, n_threads: int = 0) -> None:
        self.target = target
        if target.has("amx_tile"):
            tiles_allowed()
        self._library = _library()
        self._engine = self._library.measure_open(n_threads)
        if not self._engine:
            raise LlmcError(f"{n_threads} threads cannot be started", place="--threads", hint="ask for fewer")
        self.n_threads = int(self._library.measure_threads(self._engine))
        self._n_bytes = 0
        self._arena = 0
        self._next = 0
        self._turn = 0
        # The kernels of the limits read their grids here, for as long as the bench lives.
        self._grids = {
            "reading": ctypes.c_int32(READING_BYTES // READ_BYTES),
            "multiplying": ctypes.c_int32(MULTIPLYING_UNITS),
        }

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._library.measure_close(self._engine)
        self._library.measure_unmap(self._arena, self._n_bytes)

    # -- subjects ---------------------------------------------------------------------

    def arena(self, n_bytes: int) -> int:
        """The address of at least n_bytes of cold, random, finite numbers: the next part of the arena."""
        wanted = max(ARENA_BYTES, n_bytes)
        if wanted > self._n_bytes:
            self._library.measure_unmap(self._arena, self._n_bytes)
            self._arena, self._n_bytes, self._next = self._library.measure_map(wanted) or 0, wanted, 0
            if not self._arena:
                raise LlmcError(f"there is no memory for {wanted >> 20} MiB of weights")
            fill(np.ctypeslib.as_array((ctypes.c_uint32 * (wanted // 4)).from_address(self._arena)))
        if self._next + n_bytes > self._n_bytes:
            self._next = 0
        start = self._arena + self._next
        self._next += -(-n_bytes // 4096) * 4096
        return start

    def reading(self) -> Subject:
        """Memory read by all threads."""
        grid, function = self._grids["reading"], _address(self._library.measure_read)

        def launches(run: int) -> list[Launched]:
            return [Launched(function, grid.value, [self.arena(READING_BYTES), ctypes.addressof(grid)], [0, 0])]

        return Subject(launches, n=READING_BYTES)

    def multiplying(self, instruction: str) -> Subject:
        """An instruction's multiply-adds by all threads, each counting as two operations."""
        grid, function = self._grids["multiplying"], _address(getattr(self._library, f"measure_{instruction}"))
        at = ctypes.addressof(grid)
        launches = [Launched(function, grid.value, [at, at], [0, 0])]
        return Subject(lambda run: launches, n=2 * MULTIPLY_ADDS[instruction] * grid.value * ROUNDS * CHAINS)

    # -- measuring --------------------------------------------------------------------

    def rounds(self, subjects: Sequence[Subject], n_rounds: int) -> list[list[Sample]]:
        """For each subject a sample a round; of more rounds, when too few of some subject are clean."""
        samples: list[list[Sample]] = [[] for _ in subjects]
        for done in range(PATIENCE * n_rounds):
            if done >= n_rounds and all(2 * sum(s.clean for s in taken) >= n_rounds for taken in samples):
                break
            self._turn += 1
            order = [(i + self._turn) % len(subjects) for i in range(len(subjects))]
            for index, sample in zip(order, self._round([subjects[i] for i in order]), strict=True):
                samples[index].append(sample)
        return samples

    def _round(self, subjects: Sequence[Subject]) -> list[Sample]:
        stamps = (_Stamp * (len(subjects) + 1))()
        stamp = _address(self._library.measure_stamp)
        launched = self.reading().launches(0)  # wakes the threads
        for index, subject in enumerate(subjects):
            launched.append(Launched(stamp, 1, [ctypes.addressof(stamps[index])], [0]))
            launched += [launch for run in range(subject.runs) for launch in subject.launches(run)]
        launched.append(Launched(stamp, 1, [ctypes.addressof(stamps[len(subjects)])], [0]))
        self.run(launched)
        return [self._sample(stamps[i], stamps[i + 1], subject.runs) for i, subject in enumerate(subjects)]

    def _sample(self, begin: _Stamp, end: _Stamp, runs: int) -> Sample:
        ns = end.time_ns - begin.time_ns
        return Sample(ns / runs, (end.busy_ns - begin.busy_ns) / (ns * self.n_threads))

    def run(self, launched: Sequence[Launched]) -> None:
        """These launches in order, in one parallel region.  Raises LlmcError when a kernel fails."""
        table = (_Launch * len(launched))()
        for entry, launch in zip(table, launched, strict=True):
            numbers = ctypes.c_uint64 * len(launch.pointers)
            entry.function, entry.n_pointers, entry.grid = launch.function, len(launch.pointers), launch.grid
            entry.pointers, entry.strides = numbers(*launch.pointers), numbers(*launch.strides)
        status = self._library.measure_run(self._engine, len(launched), table)
        if status:
            raise LlmcError("a kernel failed while it was measured" if status == 1 else "there is no memory to measure")


class Layer:
    """A call compiled in one way, with memory for everything but the weight, which lies in the arena."""

    def __init__(self, executable: Executable, bench: Bench, seed: int = 0) -> None:
        call, implementation = executable.call, executable.implementation
        self._bench, self._implementation = bench, implementation
        self._functions = [_address(executable.functions[launch.kernel.name]) for launch in implementation.launches]
        self.weight_bytes = constant_bytes(call, executable, 1)
        self.y = aligned(call.outputs[0].n_bytes)
        self._kept: dict[tuple[str, int], Array] = {("output", 0): self.y}
        random = np.random.default_rng(seed)
        for index, kind in enumerate(call.inputs):
            if kind is None or index == 1:
                continue
            n_bytes = constant_bytes(call, executable, index) if kind.constant else kind.n_bytes
            self._kept["input", index] = fill(aligned(n_bytes).view(np.uint32)).view(np.uint8)
            if not kind.constant:
                values = random.standard_normal(kind.shape).astype(numpy_dtype(kind.dtype))
                self._kept["input", index][:] = values.reshape(-1).view(np.uint8)
        for index, n_bytes in enumerate(implementation.temps):
            self._kept["temp", index] = aligned(n_bytes)
        self._stride = -(-implementation.scratch_bytes // 4096) * 4096
        self._kept["scratch", 0] = aligned(self._stride * bench.n_threads)
        self.runs = 1

    def subject(self) -> Subject:
        return Subject(lambda run: self.launches(self._bench.arena(self.weight_bytes)), self.runs)

    def launches(self, weight: int) -> list[Launched]:
        """The call, with its weight at this address."""
        return [
            Launched(
                function,
                launch.grid,
                [weight if op == Operand("input", 1) else self._address(op) for op in launch.operands],
                [self._stride if op.kind == "scratch" else 0 for op in launch.operands],
            )
            for function, launch in zip(self._functions, self._implementation.launches, strict=True)
        ]

    def _address(self, operand: Operand) -> int:
        return int(self._kept[operand.kind, operand.index].ctypes.data)


def constant_bytes(call: Call, executable: Executable, index: int) -> int:
    """Bytes that a constant input takes in the artifact."""
    kind = call.inputs[index]
    assert kind is not None, "only what is there has a size"
    layout = executable.implementation.layouts.get(index) or RowMajor(kind.dtype)
    return layout.n_bytes(kind.shape)


def aligned(n_bytes: int) -> Array:
    raw = np.zeros(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def fill(words: Array, seed: int = 1) -> Array:
    """Random words that are ordinary numbers whether read as f32, bf16 or f16: between 0.5 and 2, of either sign."""
    random = np.random.default_rng(seed)
    block = random.integers(0, 1 << 32, min(words.size, 1 << 20), np.uint32) & 0x807F807F | 0x3F003F00
    for start in range(0, words.size, block.size or 1):
        part = words[start : start + block.size]
        part[:] = block[: part.size]
    return words


def _library() -> ctypes.CDLL:
    """bench.c and the runtime, as a shared library in this process."""
    compiler = link.c_compiler()
    with tempfile.TemporaryDirectory(prefix="llmc-tune-") as folder:
        work = Path(folder)
        runtime = link.runtime_object(compiler, work, cache.folder())
        (work / "table.c").write_text(link.kernel_table([("measure_stamp", 1)]))
        includes = (f"-I{link.RUNTIME}/src", f"-I{link.RUNTIME}/include")
        sources = (str(SOURCE), "table.c", str(runtime))
        link.run(
            [*compiler, *link.COMPILE_FLAGS, *includes, "-shared", *sources, "-o", "bench.so", *link.LIBRARIES], work
        )
        library = ctypes.CDLL(str(work / "bench.so"))
    library.measure_open.restype = library.measure_map.restype = ctypes.c_void_p
    library.measure_open.argtypes = [ctypes.c_int32]
    library.measure_threads.argtypes = library.measure_close.argtypes = [ctypes.c_void_p]
    library.measure_map.argtypes = [ctypes.c_uint64]
    library.measure_unmap.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    library.measure_run.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER(_Launch)]
    return library


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)

"""A chain of a model's layers on the device: every call of it, in the plan's order, over operands that lie as the
plan says; each layer has weights of its own.

Activations share one arena, as in a step, so that they are as warm; temporaries, and what no plan places, have memory
of their own.  Weights are random bits: what they lead to is finite and means nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from llmc.bench.gpu.check import CODED
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.kit import Candidate, Job, Kit
from llmc.bench.gpu.measure import (
    COLD,
    POOL_BYTES,
    Random,
    Size,
    constant_bytes,
    n_cached_pages,
    step_ids,
    weight_bytes,
    work,
)
from llmc.bench.gpu.memory import launches
from llmc.compiler.kernel import Operand, TensorType
from llmc.schedules.tuning.lines import NEIGHBOURS, TOGETHER

TERABYTES_A_SECOND, TERAFLOPS = 4.0, 700.0
"""What an H200 does, about: it puts calls in order."""
FINITE_BITS = 0xBB
"""Of each byte of codes and scales: as e4m3, f16 or f32 they are no NaN, and small."""
MOST_COPIES = 64

Choice = Mapping[str, int]
"""Candidates by their jobs' names; the rule's own, 0, for jobs that are not in it."""


@dataclass(frozen=True)
class Step:
    """A call of a chain.  places: of operands in the arena; of the KV cache, where the layer's part of a page is."""

    job: Job
    places: Mapping[Operand, int]


@dataclass(frozen=True)
class Chain:
    """Layers of a model's plan for m tokens.  length: of the contexts that attention meets."""

    model: str
    m: int
    length: int
    n_layers: int
    arena_bytes: int
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        return f"{self.model} M={self.m} @{self.length}"

    @cached_property
    def jobs(self) -> list[Job]:
        """Those with something to choose, the most expensive first, on paper."""
        times: dict[str, float] = {}
        for step in self.steps:
            times[step.job.name] = times.get(step.job.name, 0.0) + self.least_us(step.job)
        jobs = {step.job.name: step.job for step in self.steps if step.job.signature and others(step.job)}
        return sorted(jobs.values(), key=lambda job: -times[job.name])

    @cached_property
    def sets(self) -> list[tuple[str, int]]:
        """Candidates that several calls have: of all, and of two neighbours, which find room on a multiprocessor
        together or do not."""
        found = []
        for what in (TOGETHER, NEIGHBOURS):
            n_calls = Counter(index for job in self.jobs_of(what) for index in others(job))
            found += sorted((what, index) for index, n in n_calls.items() if n > 1)
        return found

    def jobs_of(self, what: str) -> list[Job]:
        """Of all calls with something to choose; of attention and the call behind it, if there are more."""
        if what == TOGETHER:
            return self.jobs
        pairs = ([step.job, behind.job] for step, behind in pairwise(self.steps) if step.job.is_attention)
        return next((pair for pair in pairs if len(self.jobs) > 2 and all(job in self.jobs for job in pair)), [])

    def least_us(self, job: Job) -> float:
        n_bytes, n_operations = work(job, job.candidates[0], self.length)
        return max(n_bytes / TERABYTES_A_SECOND, n_operations / TERAFLOPS) / 1e6

    def work(self) -> tuple[int, int]:
        """Bytes and operations of a layer, of several kinds the mean."""
        pairs = [work(step.job, step.job.candidates[0], self.length) for step in self.steps]
        return sum(n for n, _ in pairs) // self.n_layers, sum(n for _, n in pairs) // self.n_layers


@lru_cache(maxsize=2)
def chains(kit: Kit) -> tuple[Chain, ...]:
    """Those that the kit's settings ask for, for each in turn all models'."""
    return tuple(
        chain_of(kit, said, length)
        for m, length in kit.said["settings"]["in_place"]
        for said in kit.said["chains"]
        if said["m"] == m and length in said["lengths"]
    )


def chain_of(kit: Kit, said: Mapping[str, Any], length: int) -> Chain:
    steps = [
        Step(kit.jobs[step["job"]], {Operand(kind, index): offset for kind, index, offset in step["places"]})
        for step in said["steps"]
    ]
    return Chain(said["model"], said["m"], length, said["layers"], said["arena_bytes"], tuple(steps))


class RandomBits(Random):
    """Memory filled with random numbers, or with random codes and their scales."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        drawn = np.frombuffer(np.random.default_rng(0).bytes(POOL_BYTES), np.uint8)
        self._codes = device.upload(drawn & np.uint8(FINITE_BITS))

    def codes(self, n_bytes: int) -> int:
        return self.bytes(n_bytes, self._codes)


class Laid:
    """A chain in the device's memory, as many copies of it one behind the other as no cache holds.

    Raises ValueError where there is no room.
    """

    def __init__(self, device: Device, kit: Kit, chain: Chain, random: RandomBits, size: Size) -> None:
        self.chain, self._device, self._kit, self._random = chain, device, kit, random
        cold = sum(weight_bytes(step.job, step.job.candidates[0]) for step in chain.steps)
        self.n_copies = min(MOST_COPIES, max(1, -(-COLD * size.l2_bytes // max(cold, 1))))
        self._kv = self._cache(chain.arena_bytes + cold * self.n_copies)
        self._arena = random.bytes(chain.arena_bytes)
        candidates = [each for step in chain.steps for each in step.job.candidates]
        self._n_scratch = max(1, *(each.scratch_bytes for each in candidates))
        self._scratch = device.allocate(self._n_scratch)
        self.clear()
        temps = [each.temps for each in candidates]
        most = max(map(len, temps))
        self._temps = [device.allocate(max(t[i] for t in temps if i < len(t))) for i in range(most)]
        self._ids = {
            step.job.name: {index: device.upload(ids) for index, ids in step_ids(step.job, chain.length).items()}
            for step in chain.steps
            if step.job.is_attention
        }
        self._made: dict[tuple[object, ...], int] = {}
        self._runs: dict[tuple[int, int, int], Callable[[], None]] = {}

    def _cache(self, n_others: int) -> int:
        """Of attention, all layers' pages.  n_others: bytes that are needed besides."""
        job = next(step.job for step in self.chain.steps if step.job.is_attention)
        layer_bytes, n_layers = job.candidates[0].kv_layer_bytes, job.call.attribute("n_layers")
        n_bytes = n_cached_pages(job, self.chain.length) * layer_bytes * n_layers
        self._random.make_room(n_bytes + n_others)
        fill = self._random.codes if job.call.attribute("kv_dtype") == "int8" else self._random.bytes
        return fill(n_bytes)

    def clear(self) -> None:
        """Counters are zero, whatever a wrong candidate has left."""
        self._device.fill(self._scratch, 0, self._n_scratch)

    def run(self, choice: Choice) -> Callable[[], None]:
        """A function that launches all copies of the chain once."""
        runs = [
            self.step(copy, number, choice.get(step.job.name, 0))
            for copy in range(self.n_copies)
            for number, step in enumerate(self.chain.steps)
        ]

        def once() -> None:
            for each in runs:
                each()

        return once

    def step(self, copy: int, number: int, index: int) -> Callable[[], None]:
        """A function that launches one call of one copy, by its index-th candidate."""
        key = (copy, number, index)
        if key not in self._runs:
            candidate = self.chain.steps[number].job.candidates[index]
            self._runs[key] = launches(self._device, self._kit, candidate, self.places(copy, number, candidate))
        return self._runs[key]

    def places(self, copy: int, number: int, candidate: Candidate) -> dict[Operand, int]:
        """Addresses of what the candidate's launches take."""
        taken = {operand for launch in candidate.launches for operand in launch.operands}
        return {operand: self._address(copy, number, operand, candidate) for operand in taken}

    def _address(self, copy: int, number: int, operand: Operand, candidate: Candidate) -> int:
        step = self.chain.steps[number]
        job, index = step.job, operand.index
        if operand.kind == "scratch":
            return self._scratch
        if operand.kind == "temp":
            return self._temps[index]
        if operand.kind == "kv":
            return self._kv + step.places[operand]
        kind = (job.call.inputs if operand.kind == "input" else job.call.outputs)[index]
        assert kind is not None
        if operand.kind == "input" and index in self._ids.get(job.name, ()):
            return self._ids[job.name][index]
        if kind.constant:
            return self._weight(copy, number, index, kind, candidate.layouts.get(index))
        if operand in step.places:
            return self._arena + step.places[operand]
        return self._once((job.name, operand), lambda: self._random.bytes(kind.n_bytes))

    def _weight(self, copy: int, number: int, index: int, kind: TensorType, layout: dict[str, Any] | None) -> int:
        """Each copy's own."""
        fill = self._random.codes if kind.dtype in CODED else self._random.bytes
        return self._once((copy, number, index), lambda: fill(constant_bytes(kind, layout)))

    def _once(self, key: tuple[object, ...], make: Callable[[], int]) -> int:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def others(job: Job) -> list[int]:
    """Candidates besides the rule's own, 0, that take their constants as it does.  A record speaks of one number of
    rows; the weight lies once for all of them, so that a choice with another layout would put it into the artifact
    twice."""
    own, *rest = job.candidates
    return [index for index, candidate in enumerate(rest, 1) if candidate.layouts == own.layouts]

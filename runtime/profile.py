"""When each task of each step began and ended; made by Model.profile."""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.runtime import capi

Phase = Literal["picture", "prefill", "decode"]
Events = npt.NDArray[np.void]

EVENT = np.dtype(capi.Event)
"""start_ns, end_ns (of CLOCK_MONOTONIC), run, call, task, thread: see llmc_event."""
STEP_EVENTS = 1 << 18
"""Room for the events of one step."""
MOST_EVENTS = 4 << 20
"""Events that a profile keeps; the steps after them are not recorded."""


class ProfiledStep(NamedTuple):
    """One step, or what the tower makes of a tile of a picture: start_ns and end_ns of CLOCK_MONOTONIC, its events by
    start, and what it was given.

    inputs: for each sequence, the tokens it had and the tokens it got; of a tile, 0 and the rows that it becomes.
    """

    phase: Phase
    start_ns: int
    end_ns: int
    inputs: tuple[tuple[int, int], ...]
    events: Events

    @property
    def n_tokens(self) -> int:
        return sum(n for _, n in self.inputs)

    @property
    def mean_context(self) -> float:
        """Keys that a token of this step attends to, on average."""
        return sum(n * (before + (n + 1) / 2) for before, n in self.inputs) / max(1, self.n_tokens)


class Profile:
    """The steps so far.  n_lost: events that found no room.  n_unrecorded: steps after the profile was full."""

    def __init__(self) -> None:
        self.steps: list[ProfiledStep] = []
        self.n_lost = self.n_unrecorded = 0
        self._n_events = 0
        self._events: npt.NDArray[Any] = np.zeros(STEP_EVENTS, EVENT)
        self.memory = capi.Profile(c.sizeof(capi.Profile), STEP_EVENTS, 0, 0, self._events.ctypes.data)

    @contextmanager
    def step(self, inputs: Sequence[tuple[int, int]], phase: Phase | None) -> Iterator[None]:
        """Record the step made inside; a step that fails is forgotten."""
        self.memory.n_events = self.memory.n_lost = 0
        start = monotonic_ns()
        yield
        end = monotonic_ns()
        if self._n_events > MOST_EVENTS:
            self.n_unrecorded += 1
            return
        events = self._events[: self.memory.n_events]
        events = events[np.argsort(events["start_ns"], kind="stable")]
        phase = phase or ("decode" if all(n == 1 for _, n in inputs) else "prefill")
        self.steps.append(ProfiledStep(phase, start, end, tuple(inputs), events))
        self._n_events += len(events)
        self.n_lost += self.memory.n_lost

"""An open artifact: its handle in the C runtime, which is freed with it, and the steps that it runs.

This module checks what it is given, keeps handles, and turns failures into LlmcError.  Calls on one model are made one
at a time, from any thread.
"""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from llmc.runtime import capi
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from llmc.runtime.info import Info
from llmc.runtime.profile import Phase, Profile

if TYPE_CHECKING:
    from typing_extensions import Self

    from llmc.runtime.generation import How
    from llmc.runtime.sequence import Sequence

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
LoadProgress = Callable[[int, int], None]
"""Called with (bytes copied, bytes in all)."""


class NotCopied:
    """Holds a handle of the runtime, which would be freed twice if there were a copy."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__.lower()} cannot be copied or pickled: load, or fork, another one")


class Held(NotCopied):
    """Something of a model's that is given back when it is closed, or nobody has it any more.  A context manager."""

    def __init__(self) -> None:
        self._open = True

    def _give_back(self) -> None:
        """Called once."""
        raise NotImplementedError

    def close(self) -> None:
        """Give it back; closing twice is fine, and so is closing the model before."""
        if self._open:
            self._open = False
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "_open" in self.__dict__:
            self.close()


class Runner(NotCopied):
    """What `Model` (binding.py) is built on: the artifact opened by its own C runtime, and steps of many sequences.

    A context manager; `close` frees its memory and its threads.
    """

    def __init__(
        self,
        file: ArtifactFile,
        threads: int,
        kv_tokens: int,
        device: capi.Device = capi.ANY,
        progress: LoadProgress | None = None,
        slots: int = 0,
    ) -> None:
        self.path = file.path
        self._file = file
        self._lock = threading.RLock()
        self._sequences: set[int] = set()  # handles, freed before the model whoever forgets them
        self._library = library = capi.Library.of(file)
        self._handle: int | None = None
        self._profile: Profile | None = None
        self._turn: c.Array[capi.AdvanceInput] = (capi.AdvanceInput * 1)()  # kept from call to call
        options, handle = capi.Options(c.sizeof(capi.Options)), capi.Handle()
        options.n_threads, options.kv_tokens = min(threads, 0x7FFFFFFF), min(kv_tokens, 0xFFFFFFFFFFFFFFFF)
        options.run_on, options.device = device
        options.n_slots = min(slots, 0xFFFFFFFF)
        try:
            with capi.reporting(options, progress):
                library.check(library.api.open(options, handle))
        except BaseException:
            library.release()
            raise
        self._handle = handle.value

    def close(self) -> None:
        """Free the model and all its sequences; closing twice is fine."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                for sequence in self._sequences:
                    self._library.api.sequence_free(sequence)
                self._sequences.clear()
                self._library.api.close(handle)
                self._library.release()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "_handle" in self.__dict__:  # absent when __init__ failed early
            self.close()

    @property
    def info(self) -> Info:
        """Sizes, threads, and the room in the KV cache as it is now."""
        raw = capi.Info(size=c.sizeof(capi.Info))
        with self.running() as (api, handle):
            self._library.check(api.info(handle, raw))
        return Info.of(raw)

    # -- steps ----------------------------------------------------------------

    def step(self, inputs: Iterable[tuple[Sequence, Iterable[int]]]) -> None:
        """Append tokens to several sequences at once; on an error nothing is appended to any."""
        self.run_step([(sequence, self.check_ids(tokens), None) for sequence, tokens in inputs])

    def sample(self, inputs: Iterable[tuple[Sequence, How]]) -> list[int]:
        """The next token of several sequences, as Sequence.sample chooses it; on a GPU at about the cost of one."""
        listed = list(inputs)
        self.check_hows(how for _, how in listed)
        with self.running() as (api, handle):
            if not capi.has(api, "sample_many"):
                return [sequence.sample(how) for sequence, how in listed]
            raw = (capi.SampleInput * len(listed))()
            for entry, (sequence, how) in zip(raw, listed, strict=True):
                entry.sequence, entry.how = sequence.handle, capi.pointer_to(how)
            self.check(api.sample_many(handle, raw, len(listed)))
            return [int(entry.token) for entry in raw]

    @cached_property
    def runs_ahead(self) -> bool:
        """Whether `advance` returns while its step still runs: on a GPU, by a runtime that can."""
        return capi.has(self._library.api, "advance") and self.info.device != "CPU"

    def check_hows(self, hows: Iterable[How]) -> None:
        """Raise LlmcError where something is asked for that the artifact's runtime cannot heed."""
        for how in [how for how in hows if not how.is_plain]:
            self.info.check_how(how, str(self.path))

    def advance(self, inputs: Iterable[tuple[Sequence, How]]) -> list[int]:
        """The next token of several sequences, as `sample` chooses it, appended to each as by `step`.

        On a GPU it returns the tokens while the step that appends them still runs; what is asked next waits only if it
        needs that step's results, and `Sequence.truncate`, which takes a token back, does not wait.  On an error
        nothing is appended to any.
        """
        listed = list(inputs)
        self.check_hows(how for _, how in listed)
        with self.running() as (api, handle):
            if self._profile is not None or not capi.has(api, "advance"):
                return self._sample_and_step(listed)
            n = len(listed)
            if len(self._turn) < n:
                self._turn = (capi.AdvanceInput * n)()
            turn = self._turn
            for entry, (sequence, how) in zip(turn, listed, strict=False):
                entry.sequence, entry.how = sequence.handle, capi.pointer_to(how)
            self.check(api.advance(handle, turn, n))
            return [entry.token for entry in turn[:n]]

    def _sample_and_step(self, inputs: list[tuple[Sequence, How]]) -> list[int]:
        """`advance` in two calls: for an artifact from before it, and so that a profile has the step alone."""
        tokens = self.sample(inputs)
        ids = np.array(tokens, dtype=np.int32)
        self.run_step([(sequence, ids[i : i + 1], None) for i, (sequence, _) in enumerate(inputs)])
        return tokens

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Record when each task of the steps made meanwhile begins and ends.

        Raises LlmcError when the artifact's runtime cannot tell.
        """
        with self.running() as (api, handle):
            capi.check_has(api, "profile", "measure its kernels", str(self.path))
            self._profile = profile = Profile()
            self.check(api.profile(handle, profile.memory))
        try:
            yield profile
        finally:
            self._profile = None
            with self.running() as (api, handle):
                self.check(api.profile(handle, None))

    # -- for Sequence ---------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[tuple[capi.Api, int]]:
        """The function table and the model's handle, for one caller at a time."""
        with self._lock:
            if self._handle is None:
                raise LlmcError("the model is closed", place=str(self.path))
            yield self._library.api, self._handle

    def run_step(self, inputs: list[tuple[Sequence, Ids, Logits | None]], phase: Phase | None = None) -> None:
        """One llmc_step; logits, where given, are float32 [n, n_vocab] and are filled.

        phase: what a profile calls the step; by default "decode" when no sequence gets more than one token.
        """
        raw = (capi.StepInput * len(inputs))()
        with self.running() as (api, handle):
            for entry, (sequence, ids, logits) in zip(raw, inputs, strict=True):
                entry.sequence, entry.tokens, entry.n_tokens = sequence.handle, ids.ctypes.data, len(ids)
                entry.logits = None if logits is None else logits.ctypes.data
            with self.recording([(sequence, ids) for sequence, ids, _ in inputs], phase):
                self.check(api.step(handle, raw, len(inputs)))

    @contextmanager
    def recording(self, inputs: Iterable[tuple[Sequence, Ids]], phase: Phase | None = None) -> Iterator[None]:
        """Around a step of the model that is `running`: for its profile, if somebody wants one."""
        if self._profile is None:
            yield
            return
        length = self._library.api.sequence_length
        with self._profile.step([(int(length(sequence.handle)), len(ids)) for sequence, ids in inputs], phase):
            yield

    @contextmanager
    def recording_tile(self, n_rows: int) -> Iterator[None]:
        """The same around what makes so many rows of a tile of a picture, or of a whole one."""
        if self._profile is None:
            yield
            return
        with self._profile.step([(0, n_rows)], "picture"):
            yield

    def check(self, status: int) -> None:
        """Raise LlmcError for a status that is not LLMC_OK."""
        self._library.check(status)

    def check_ids(self, tokens: Iterable[int]) -> Ids:
        """int32 [n], contiguous.  Raises LlmcError naming the first token that is out of range."""
        return self.info.check_ids(tokens, str(self.path))

    def check_length(self, n_tokens: int) -> None:
        """Raise LlmcError when a sequence cannot hold so many tokens."""
        self.info.check_length(n_tokens, str(self.path))

    def adopt(self, handle: int) -> None:
        """Free this sequence when the model is closed, unless it is freed before."""
        self._sequences.add(handle)

    def release(self, handle: int) -> None:
        """Free a sequence now."""
        with self._lock:
            if handle in self._sequences:
                self._sequences.remove(handle)
                self._library.api.sequence_free(handle)

    def forget(self, first: int) -> None:
        """Free the rows that begin with this number, unless the model is closed."""
        with self._lock:
            if self._handle is not None:
                self._library.api.rows_free(self._handle, first)

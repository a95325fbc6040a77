"""The C interface of a loaded artifact, for tests: thin, and nothing is checked here but the status."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Sequence
from pathlib import Path

from llmc.runtime.capi import AdvanceInput, Api, Handle, Info, Options, SampleInput, Sampling, StepInput

OK, IO, FORMAT, TARGET, MEMORY, ARGUMENT, KERNEL = range(7)

How = tuple[float, int, float, int] | tuple[float, int, float, int, int]
"""temperature, top_k, top_p, seed, and perhaps the address of what is allowed."""


class Refused(Exception):
    """A call that did not return LLMC_OK."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Model:
    """An open model.  A context manager."""

    def __init__(self, path: Path, n_threads: int = 1, kv_tokens: int = 0, n_slots: int = 0) -> None:
        library = c.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        library.llmc_get_api.restype = c.POINTER(Api)
        self.api: Api = library.llmc_get_api(1).contents
        self.handle = Handle()
        options = Options(c.sizeof(Options), n_threads, kv_tokens, n_slots=n_slots)
        self.check(self.api.open(c.byref(options), c.byref(self.handle)))

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.api.close(self.handle)

    def check(self, status: int) -> None:
        if status:
            raise Refused(status, self.api.last_error().decode())

    def info(self) -> Info:
        info = Info(c.sizeof(Info))
        self.check(self.api.info(self.handle, c.byref(info)))
        return info

    def text(self, token: int) -> bytes:
        at, n_bytes = c.c_void_p(), c.c_size_t()
        self.check(self.api.token_text(self.handle, token, c.byref(at), c.byref(n_bytes)))
        return c.string_at(at.value or 0, n_bytes.value)

    def sequence(self, tokens: Sequence[int] = ()) -> Text:
        handle = Handle()
        self.check(self.api.sequence_new(self.handle, c.byref(handle)))
        sequence = Text(self, handle)
        if tokens:
            sequence.feed(tokens)
        return sequence

    def restore(self, path: Path) -> Text:
        handle = Handle()
        self.check(self.api.sequence_restore(self.handle, str(path).encode(), c.byref(handle)))
        return Text(self, handle)

    def step(self, inputs: Sequence[tuple[Text, Sequence[int]]], all_logits: bool = False) -> list[list[float]]:
        """One step.  With all_logits: for each input, the logits after each of its tokens, one flat list."""
        n_vocab = self.info().n_vocab
        tokens = [(c.c_int32 * len(ids))(*ids) for _, ids in inputs]
        rooms = [(c.c_float * (len(ids) * n_vocab * all_logits))() for _, ids in inputs]
        array = (StepInput * len(inputs))()
        for i, (sequence, ids) in enumerate(inputs):
            room = c.addressof(rooms[i]) if all_logits else None
            array[i] = StepInput(sequence.handle, c.addressof(tokens[i]), len(ids), room)
        self.check(self.api.step(self.handle, array, len(inputs)))
        return [list(room) for room in rooms]

    def sample_many(self, inputs: Sequence[tuple[Text, How | None]]) -> list[int]:
        """For each sequence the next token."""
        hows = [Sampling(c.sizeof(Sampling), *how) if how else None for _, how in inputs]
        array = (SampleInput * len(inputs))()
        for i, (sequence, _) in enumerate(inputs):
            how = hows[i]
            array[i].sequence = sequence.handle
            if how is not None:
                array[i].how = c.pointer(how)
        self.check(self.api.sample_many(self.handle, array, len(inputs)))
        return [int(entry.token) for entry in array]

    def advance(self, inputs: Sequence[tuple[Text, How | None]]) -> list[int]:
        """The same, and a step on the tokens."""
        hows = [Sampling(c.sizeof(Sampling), *how) if how else None for _, how in inputs]
        array = (AdvanceInput * len(inputs))()
        for entry, how, (sequence, _) in zip(array, hows, inputs, strict=True):
            entry.sequence = sequence.handle
            if how is not None:
                entry.how = c.pointer(how)
        self.check(self.api.advance(self.handle, array, len(inputs)))
        return [int(entry.token) for entry in array]


class Text:
    """A sequence of a model."""

    def __init__(self, model: Model, handle: Handle) -> None:
        self.model, self.handle = model, handle

    def __len__(self) -> int:
        return int(self.model.api.sequence_length(self.handle))

    def feed(self, tokens: Sequence[int]) -> None:
        self.model.check(self.model.api.feed(self.handle, (c.c_int32 * len(tokens))(*tokens), len(tokens)))

    def fork(self) -> Text:
        handle = Handle()
        self.model.check(self.model.api.sequence_fork(self.handle, c.byref(handle)))
        return Text(self.model, handle)

    def save(self, path: Path, note: bytes = b"") -> None:
        self.model.check(self.model.api.sequence_save(self.handle, str(path).encode(), note, len(note)))

    def tokens(self) -> list[int]:
        out = c.POINTER(c.c_int32)()
        self.model.check(self.model.api.sequence_tokens(self.handle, c.byref(out)))
        return out[: len(self)]

    def note(self) -> bytes:
        at, n_bytes = c.c_void_p(), c.c_size_t()
        self.model.check(self.model.api.sequence_note(self.handle, c.byref(at), c.byref(n_bytes)))
        return c.string_at(at.value or 0, n_bytes.value)

    def truncate(self, n: int) -> None:
        self.model.check(self.model.api.sequence_truncate(self.handle, n))

    def free(self) -> None:
        self.model.api.sequence_free(self.handle)

    def logits(self) -> list[float]:
        out = c.POINTER(c.c_float)()
        self.model.check(self.model.api.logits(self.handle, c.byref(out)))
        return out[: self.model.info().n_vocab]

    def sample(self, temperature: float = 0, top_k: int = 0, top_p: float = 1, seed: int = 0) -> int:
        how, token = Sampling(c.sizeof(Sampling), temperature, top_k, top_p, seed), c.c_int32()
        self.model.check(self.model.api.sample(self.handle, c.byref(how), c.byref(token)))
        return token.value

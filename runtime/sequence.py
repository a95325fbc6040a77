"""A sequence of a model: tokens, and what the model keeps of them."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterable
from collections.abc import Sequence as Row
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from llmc.runtime import capi
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.profile import Phase
from llmc.runtime.runner import Held

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Ids, Logits

StrPath: TypeAlias = "str | os.PathLike[str]"


class Sequence(Held):
    """Tokens, their KV cache, and the state of a model that has some; made by Model.sequence.  A context manager;
    `close` gives its pages back."""

    def __init__(self, model: Model, handle: capi.Handle) -> None:
        assert handle.value is not None
        self.model, self._handle = model, handle.value
        super().__init__()
        model.adopt(self._handle)

    @property
    def handle(self) -> int:
        """The llmc_sequence."""
        if not self._open:
            raise LlmcError("the sequence is closed", place=str(self.model.path))
        return self._handle

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        with self.model.running() as (api, _):
            return int(api.sequence_length(self.handle))

    @property
    def tokens(self) -> list[int]:
        """The tokens themselves."""
        out = c.POINTER(c.c_int32)()
        with self.model.running() as (api, _):
            capi.check_has(api, "sequence_tokens", "tell a sequence's tokens", str(self.model.path))
            self.model.check(api.sequence_tokens(self.handle, out))
            return out[: api.sequence_length(self.handle)]

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that its tokens go through; None: the model alone."""
        with self.model.running() as (api, _):
            number = int(api.sequence_adapter(self.handle)) if capi.has(api, "sequence_adapter") else -1
        return None if number < 0 else self.model.adapters[number]

    @property
    def has_logits(self) -> bool:
        """Whether the logits after its last token are there: not after `truncate`."""
        with self.model.running() as (api, _):
            return int(api.logits(self.handle, c.POINTER(c.c_float)())) == 0

    def feed(self, tokens: Iterable[int]) -> None:
        """Append tokens; on an error, or Ctrl-C between two chunks of a long input, none are: the sequence is as it
        was, or, with a state that has gone on meanwhile, empty."""
        self._feed(self.model.check_ids(tokens), None)

    def feed_for_logits(self, tokens: Iterable[int]) -> Logits:
        """Append tokens, and give the logits after each: float32 [n, n_vocab]."""
        ids = self.model.check_ids(tokens)
        logits = np.empty((len(ids), self.model.info.n_vocab), dtype=np.float32)
        self._feed(ids, logits)
        return logits

    def logits(self) -> Logits:
        """float32 [n_vocab]: the logits after the last token fed (a copy)."""
        out = c.POINTER(c.c_float)()
        with self.model.running() as (api, _):
            self.model.check(api.logits(self.handle, out))
            return np.ctypeslib.as_array(out, (self.model.info.n_vocab,)).copy()

    def sample(self, how: How = GREEDY) -> int:
        """The next token, chosen from the logits after the last one fed; it is not appended."""
        token = c.c_int32()
        self.model.check_hows([how])
        with self.model.running() as (api, _):
            self.model.check(api.sample(self.handle, capi.sampling(how), token))
        return token.value

    def fork(self) -> Sequence:
        """A copy that shares its full pages with this one, and the state until either is fed."""
        out = capi.Handle()
        with self.model.running() as (api, _):
            self.model.check(api.sequence_fork(self.handle, out))
            return Sequence(self.model, out)

    def repeat(self, n: int) -> Sequence:
        """For measurements: a sequence of n tokens that shares nothing with this one and repeats its keys and values.

        Nothing is computed; longer than this one it takes 64 tokens here.  Raises LlmcError: no room, or an artifact
        whose runtime cannot.
        """
        out = capi.Handle()
        with self.model.running() as (api, _):
            capi.check_has(api, "sequence_repeat", "repeat a sequence", str(self.model.path))
            self.model.check(api.sequence_repeat(self.handle, n, out))
            return Sequence(self.model, out)

    def save(self, path: StrPath, note: bytes = b"") -> None:
        """Write all that the model knows of this sequence to a file, for `Model.restore`, and a note of up to 64 MiB.

        The file is its owner's alone, and there whole, or as it was before.  Raises LlmcError, also for a model that
        reads texts whole, which keeps nothing.
        """
        with self.model.running() as (api, _):
            capi.check_has(api, "sequence_save", "save a sequence", str(self.model.path))
            self.model.check(api.sequence_save(self.handle, as_path(path), note, len(note)))

    @property
    def note(self) -> bytes:
        """The note that was given to `save`, of a sequence that was restored; empty for others."""
        at, n_bytes = c.c_void_p(), c.c_size_t()
        with self.model.running() as (api, _):
            capi.check_has(api, "sequence_note", "save a sequence", str(self.model.path))
            self.model.check(api.sequence_note(self.handle, at, n_bytes))
            return c.string_at(at.value or 0, n_bytes.value)

    def truncate(self, n: int) -> None:
        """Keep the first n tokens, forget the rest and the logits.  Raises LlmcError where a state would have to go
        back; `cut` then forgets all."""
        with self.model.running() as (api, _):
            self.model.check(api.sequence_truncate(self.handle, n))

    def cut(self, n: int) -> int:
        """Keep the first n tokens, or what there is of them.  -> how many are kept: a state does not go back, and of a
        model that has some none are where any have to go; a picture whose rows see each other stays whole or goes."""
        length = self.length
        if n < length:
            self.truncate(0 if self.model.has_states else n)
            return self.length
        return length

    def _give_back(self) -> None:
        self.model.release(self._handle)

    def _feed(self, ids: Ids, logits: Logits | None) -> None:
        """In chunks, so that Ctrl-C is heard between them."""
        before, chunk = self.length, self.model.info.max_step_tokens
        phase: Phase = "prefill" if before == 0 or len(ids) > 1 else "decode"
        self.model.check_length(before + len(ids))
        try:
            start, whole = 0, self.model.info.whole
            while start < len(ids):
                rows = slice(start, whole(ids, start + chunk))
                self.model.run_step([(self, ids[rows], None if logits is None else logits[rows])], phase)
                start = rows.stop
        except BaseException:
            self.cut(before)
            raise


def restore(model: Model, path: StrPath) -> Sequence:
    """See Model.restore."""
    out = capi.Handle()
    with model.running() as (api, handle):
        capi.check_has(api, "sequence_restore", "restore a sequence", str(model.path))
        model.check(api.sequence_restore(handle, as_path(path), out))
        return Sequence(model, out)


def as_path(path: StrPath) -> bytes:
    """The path as bytes, for the runtime.  Raises LlmcError for what cannot be a path."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if not encoded or b"\0" in encoded:
        raise LlmcError("this is no path", place=repr(os.fspath(path)))
    return encoded


def as_ids(tokens: Row[int]) -> Ids:
    return np.array(tokens, dtype=np.int32)


def common(first: Ids, second: Ids) -> int:
    """How many tokens two texts begin with in common."""
    n = min(len(first), len(second))
    differs = first[:n] != second[:n]
    return int(differs.argmax()) if differs.any() else n

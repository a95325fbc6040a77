"""Adapters of an artifact: small changes of a model, of which a sequence chooses one by name."""

from __future__ import annotations

import ctypes as c
from typing import TYPE_CHECKING

from llmc.runtime.errors import LlmcError, shortened

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.sequence import Sequence, StrPath


def names_of(model: Model) -> tuple[str, ...]:
    """The names of a model's adapters, in the order of their numbers."""
    n_adapters, names = model.info.n_adapters, []
    with model.running() as (api, handle):
        for number in range(n_adapters):
            name = c.c_char_p()
            model.check(api.adapter_name(handle, number, name))
            names.append((name.value or b"").decode("ascii", "replace"))
    return tuple(names)


def number_of(model: Model, name: str | None) -> int:
    """The number of the adapter of this name; -1 for None, the model alone.  Raises LlmcError where there is none."""
    if name is None:
        return -1
    if name in model.adapters:
        return model.adapters.index(name)
    fact = f"the artifact has no adapter {shortened(repr(name))}"
    known = f"it has {', '.join(model.adapters)}" if model.adapters else "compile it in: --adapter NAME=FOLDER"
    raise LlmcError(fact, place=str(model.path), hint=known)


def choose(sequence: Sequence, number: int) -> Sequence:
    """Let an empty sequence go through the adapter of this number; -1: through none.  -> the same sequence."""
    if number >= 0:
        with sequence.model.running() as (api, _):
            sequence.model.check(api.sequence_set_adapter(sequence.handle, number))
    return sequence


def restored(model: Model, path: StrPath, name: str | None) -> Sequence:
    """The sequence that was saved at a path.  Raises LlmcError where it goes through another adapter than this one."""
    sequence = model.restore(path)
    theirs = sequence.adapter
    if theirs == name:
        return sequence
    sequence.close()
    said, wanted = (f"the adapter {each!r}" if each else "the model alone" for each in (theirs, name))
    fact = f"this file keeps what {said} knows of a text, and {wanted} is asked for"
    hint = f"ask for --adapter {theirs}, or name another file" if theirs else "name another file"
    raise LlmcError(fact, place=str(path), hint=hint)

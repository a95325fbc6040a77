"""GGUF files: what they say of a model, and where its tensors lie.

A file is "GGUF", version, counts of tensors and of fields; the fields, each a name, a type and a value; for each tensor
its name, sizes (the fastest first), type and place; then, from the next multiple of `general.alignment` on, their data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).  A model may lie in several, NAME-00001-of-00003.gguf and
so on; what it is stands in the first.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from llmc.compiler.frontend.checkpoint import LONGEST_HEADER, StoredTensor, check_apart, check_end
from llmc.compiler.frontend.packed.ggml import KINDS
from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.read_file import refuse_pipe

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of fields that are one number, as `struct` calls them."""
STRING, ARRAY = 8, 9
MOST_AXES = 4
LONGEST_NAME = 64
BROKEN = "the file is truncated, or is not GGUF"
PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
"""How the stem of a piece's name is made."""
MOST_PIECES = 1000
AGAIN = "download the model again"


@dataclass(frozen=True)
class GgufFile:
    """fields: what the file says of the model, by name.  tensors: by name, unread, in the blocks of packed/ggml.py."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        return shortened(self.fields.get("general.architecture"))

    @property
    def name(self) -> str:
        """The file's, without its number and how many there are."""
        piece = PIECE.fullmatch(self.path.stem)
        return piece[1] if piece else self.path.stem


class Cursor:
    """A place in a file's header.  Whatever lies outside of the file, or makes the header too long, is a ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, min(len(data), LONGEST_HEADER)

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > self.end - self.at:
            raise ValueError("beyond the file's end")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        form = f"<{count}{form}"
        if count > self.end:
            raise ValueError("beyond the file's end")
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A field's value; arrays hold numbers or texts."""
        if kind in FORMATS:
            return self.numbers(FORMATS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"a field of type {kind}")
        of, count = self.numbers("I")[0], self.numbers("Q")[0]
        if of in FORMATS:
            return list(self.numbers(FORMATS[of], count))
        if of != STRING or 8 * count > self.end:
            raise ValueError(f"{count} values of type {of}")
        return [self.text() for _ in range(count)]


def open_gguf(path: Path) -> GgufFile:
    """What a GGUF file holds, with its further pieces.  Reads no tensor; checks that every one lies within its file,
    has its shape's size and its bytes for itself."""
    first = open_piece(path)
    n_pieces = first.fields.get("split.count", 0)
    if n_pieces in (0, 1):
        return first
    name = PIECE.fullmatch(path.stem)
    if name is None or type(n_pieces) is not int or not 1 < n_pieces <= MOST_PIECES or int(name[3]) != n_pieces:
        fact = f"the file is one of {shortened(n_pieces)}, and its name does not say which of them"
        raise LlmcError(fact, place=str(path), hint="pieces are named NAME-00001-of-00003.gguf")
    if int(name[2]) != 1:
        hint = f"give the first, {name[1]}-00001-of-{name[3]}.gguf"
        raise LlmcError("the file is one piece of a model, and not its first", place=str(path), hint=hint)
    tensors = dict(first.tensors)
    for number in range(2, n_pieces + 1):
        piece = open_piece(path.with_name(f"{name[1]}-{number:05}-of-{name[3]}{path.suffix}"))
        if piece.fields.get("split.count") != n_pieces or tensors.keys() & piece.tensors.keys():
            raise LlmcError("the file is a piece of another model", place=str(piece.path), hint=AGAIN)
        tensors |= piece.tensors
    if len(tensors) != first.fields.get("split.tensors.count", len(tensors)):
        raise LlmcError("the pieces of the model have not all of its tensors", place=str(path), hint=AGAIN)
    return replace(first, tensors=tensors)


def open_piece(path: Path) -> GgufFile:
    """What one file holds."""
    refuse_pipe(path)
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, Cursor(data))
    except (ValueError, OverflowError, struct.error, MemoryError) as error:
        raise LlmcError(BROKEN, place=str(path), hint=AGAIN) from error
    except OSError as error:
        raise LlmcError(f"the file cannot be read: {error.strerror}", place=str(path)) from error


def _read(path: Path, cursor: Cursor) -> GgufFile:
    magic, (version,), (n_tensors, n_fields) = cursor.take(4), cursor.numbers("I"), cursor.numbers("Q", 2)
    if magic != MAGIC:
        raise ValueError("another file")
    if version not in VERSIONS:
        raise LlmcError(f"GGUF of version {version} is not read", place=str(path), hint="llmc reads versions 2 and 3")
    fields: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.text()
        fields[name] = cursor.value(cursor.numbers("I")[0])
    entries = [_entry(path, cursor) for _ in range(n_tensors)]
    align = fields.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError("alignment")
    data = -(-cursor.at // align) * align
    tensors = {}
    for name, kind, dims, offset in entries:
        if name in tensors:
            raise ValueError(f"two tensors {name}")
        n_bytes = prod(dims) // KINDS[kind].n * KINDS[kind].n_bytes
        tensors[name] = StoredTensor(name, path, KINDS[kind].name, dims, data + offset, n_bytes)
        check_end(tensors[name], len(cursor.data))
    check_apart(tensors)
    return GgufFile(path, fields, tensors)


def _entry(path: Path, cursor: Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """A tensor's name, type, dims (the fastest last) and its place in the data."""
    name, (n_axes,) = cursor.text(), cursor.numbers("I")
    if not 1 <= n_axes <= MOST_AXES or len(name) > LONGEST_NAME:
        raise ValueError(f"{n_axes} axes")
    dims = tuple(reversed(cursor.numbers("Q", n_axes)))
    kind, offset = cursor.numbers("I")[0], cursor.numbers("Q")[0]
    if kind not in KINDS:
        known = ", ".join(each.name for each in KINDS.values())
        fact = f"tensor {name!r} is of ggml's type {kind}, which is not read"
        raise LlmcError(fact, place=str(path), hint=f"llmc reads {known}")
    if min(dims) < 1 or dims[-1] % KINDS[kind].n:
        raise ValueError(f"dims {dims}")
    return name, kind, dims, offset

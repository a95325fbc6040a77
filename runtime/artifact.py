"""Reading an artifact without executing anything of it: sections, hashes, manifest, plans.

The bytes are described in src/format.h.  Nothing they say is believed before it is checked against the file's real
size, and no memory is taken on the word of a header: a hostile file gives an LlmcError, never a crash.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmc.runtime.errors import LlmcError
from llmc.runtime.format import (
    FORMAT_VERSIONS,
    MAX_PROGRAMS,
    MAX_SECTIONS,
    SECTION,
    SECTION_ALIGNMENT,
    TRAILER,
    TRAILER_MAGIC,
    WEIGHTS_ALIGNMENT,
    Section,
)
from llmc.runtime.parse_json import parse_json
from llmc.runtime.plan import PlanTables, unpack_plan

REQUIRED_SECTIONS = ("code", "weights", "plan", "manifest")
READ_BYTES = 1 << 20
"""Read this much at a time while hashing."""
LARGEST_TEXT_BYTES = 1 << 28
"""No section that is read whole (manifest, plan, graph, …) comes near this."""
ELF_MAGIC = b"\x7fELF"
COMPILE_AGAIN = "compile the model again, or copy the artifact again"

HashProgress = Callable[[int, int], None]
"""Called with (bytes hashed, bytes in all)."""


def program_section(name: str, program: int) -> str:
    """The name of a program's section: "plan" is the first one's, "plan.1" the next one's."""
    return f"{name}.{program}" if program else name


def runs_on(target: str, machine: str) -> bool:
    """Whether "cuda:sm_90a" is what "cuda:sm_90a", or "cuda", asks for."""
    return machine in (target, target.partition(":")[0])


def is_weights(section: str) -> bool:
    return section.split(".")[0] == "weights"


class ArtifactFile:
    """An artifact opened for reading.  A context manager; `close` gives the file back.

    path: as it was given.  n_bytes: of the whole file.  sections: by name, in file order.
    """

    def __init__(self, path: Path, descriptor: int, n_bytes: int, sections: Mapping[str, Section]) -> None:
        self.path, self.n_bytes, self.sections = path, n_bytes, sections
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ArtifactFile:
        """Check the trailer, the directory and every section but the weights.

        Raises LlmcError: no such file, not an artifact, truncated, of another version, or a damaged section.
        """
        where = Path(path)
        descriptor = _open_file(where)
        try:
            n_bytes = os.fstat(descriptor).st_size
            sections = _read_directory(where, descriptor, n_bytes)
            artifact = cls(where, descriptor, n_bytes, sections)
            for name in sections:
                if not is_weights(name):
                    artifact._check_hash(name, None)
        except BaseException:
            os.close(descriptor)
            raise
        return artifact

    @property
    def descriptor(self) -> int:
        """The open file, owned by this object."""
        return self._descriptor

    def close(self) -> None:
        """Give the file back; closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ArtifactFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def section(self, name: str) -> bytes:
        """The bytes of a section, which are those that its hash covers.  Not for the weights, which may be large."""
        section = self._find(name)
        if section.n_bytes > LARGEST_TEXT_BYTES:
            raise LlmcError(f"section {name!r} is {section.n_bytes} bytes, too large to read", place=str(self.path))
        data = b"".join(self._chunks(section))
        if hashlib.sha256(data).digest() != section.sha256:
            raise self._damaged(name)
        return data

    def manifest(self, program: int = 0) -> dict[str, Any]:
        """What the artifact says of itself and of a program: model, target, sizes, plans, parity certificate."""
        said = self._json("manifest")
        own = self._said_of_programs(said)[program:]
        return {**said, **own[0]} if own else said

    @property
    def targets(self) -> list[str]:
        """The target of each program, in the order of preference; "" where the manifest does not say."""
        said = self._json("manifest")
        found = [one.get("target") for one in self._said_of_programs(said) or [said]]
        return [str(target.get("name", "")) if isinstance(target, dict) else "" for target in found]

    def _said_of_programs(self, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each program what differs from the first one's; nothing when there is but one."""
        said = manifest.get("targets", [])
        if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
            raise self._damaged("manifest")
        return said

    def program_for(self, target: str) -> int:
        """The number of the first program for a target, "cuda:sm_90a", or a kind of device, "cuda".

        Raises LlmcError: there is none.
        """
        targets = self.targets
        for number, name in enumerate(targets):
            if runs_on(name, target):
                return number
        hint = f"it has {', '.join(targets)}"
        raise LlmcError(f"the artifact has no program for {target}", place=str(self.path), hint=hint)

    def graph(self, program: int = 0) -> dict[str, Any] | None:
        """The record of the passes and the text of the final graph, if the artifact keeps it."""
        name = self.section_of("graph", program)
        return self._json(name) if name in self.sections else None

    def tower_graph(self) -> dict[str, Any] | None:
        """The same of the tower, if there is one."""
        return self._json("tower") if "tower" in self.sections else None

    def tokenizer_json(self) -> str | None:
        """The tokenizer as its own JSON file, or None: then only token ids can be used."""
        if "tokenizer" not in self.sections:
            return None
        try:
            return self.section("tokenizer").decode()
        except UnicodeDecodeError:
            raise self._damaged("tokenizer") from None

    def chat(self) -> dict[str, Any] | None:
        """How messages become a prompt; None: the artifact does not say.

        "template": in Jinja.  "tokens": the special tokens that it may write, by name.  "tool_use": a template for
        messages with tools, if there is another for those.
        """
        if "chat" not in self.sections:
            return None
        said = self._json("chat")
        texts = said.get("template"), said.get("tool_use", "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(said.get("tokens"), dict):
            raise self._damaged("chat")
        return said

    def processor(self) -> bytes | None:
        """How pictures are prepared: see processor.py; None: the artifact takes none."""
        return self.section("processor") if "processor" in self.sections else None

    @property
    def n_programs(self) -> int:
        """How many targets the artifact is for: each has a plan of its own."""
        names = (program_section("plan", i) for i in range(MAX_PROGRAMS))
        return next((i for i, name in enumerate(names) if name not in self.sections), MAX_PROGRAMS)

    def section_of(self, name: str, program: int) -> str:
        """The section that a program reads: its own, or the first one's where it has none."""
        own = program_section(name, program)
        return own if own in self.sections else name

    def plan(self, program: int = 0) -> PlanTables:
        """The kernel calls of every step, with each index and range checked."""
        weights = self._find(self.section_of("weights", program))
        return unpack_plan(self.section(program_section("plan", program)), weights.n_bytes, str(self.path))

    def check_weights(self, progress: HashProgress | None = None) -> None:
        """Hash the weights: what `open` leaves, as it takes seconds for a large model."""
        for name in filter(is_weights, self.sections):
            self._check_hash(name, progress)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = parse_json(self.section(name))
        except ValueError:
            raise self._damaged(name) from None
        if not isinstance(value, dict):
            raise self._damaged(name)
        return value

    def _find(self, name: str) -> Section:
        if name not in self.sections:
            known = ", ".join(self.sections)
            raise LlmcError(f"the artifact has no section {name!r}", place=str(self.path), hint=f"it has {known}")
        return self.sections[name]

    def _check_hash(self, name: str, progress: HashProgress | None) -> None:
        section, digest, done = self._find(name), hashlib.sha256(), 0
        for chunk in self._chunks(section):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, section.n_bytes)
        if digest.digest() != section.sha256:
            raise self._damaged(name)

    def _chunks(self, section: Section) -> Iterator[bytes]:
        offset, end = section.offset, section.offset + section.n_bytes
        while offset < end:
            chunk = _read_at(self.path, self._descriptor, min(READ_BYTES, end - offset), offset)
            if not chunk:
                raise LlmcError("the artifact became shorter while it was read", place=str(self.path))
            yield chunk
            offset += len(chunk)

    def _damaged(self, name: str) -> LlmcError:
        return LlmcError(
            f"the artifact is damaged: section {name!r} is not what was written",
            place=str(self.path),
            hint=COMPILE_AGAIN,
        )


def _open_file(path: Path) -> int:
    hint = "give the artifact.so that llmc compile wrote"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise LlmcError("no such file", place=str(path), hint=hint) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LlmcError(f"cannot open the artifact: {reason}", place=str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise LlmcError(f"this is {what}, not an artifact", place=str(path), hint=hint)
    return descriptor


def _read_at(path: Path, descriptor: int, n_bytes: int, offset: int) -> bytes:
    """Read so many bytes from an offset on, or as many as there are."""
    try:
        return os.pread(descriptor, n_bytes, offset)
    except OSError as error:  # a disk's, which names no file
        raise LlmcError(f"the artifact cannot be read: {error.strerror}", place=str(path)) from None


def _read_directory(path: Path, descriptor: int, n_bytes: int) -> dict[str, Section]:
    """The section table behind the trailer, checked."""
    if n_bytes < TRAILER.size:
        raise _not_an_artifact(path, descriptor)
    trailer = TRAILER.unpack(_read_at(path, descriptor, TRAILER.size, n_bytes - TRAILER.size))
    magic, version, n_sections, offset, file_bytes, sha256 = trailer
    if magic != TRAILER_MAGIC:
        raise _not_an_artifact(path, descriptor)
    if version not in FORMAT_VERSIONS:
        first, *_, last = FORMAT_VERSIONS
        fact = f"the artifact has format version {version}; this llmc reads versions {first} to {last}"
        raise LlmcError(fact, place=str(path), hint="compile the model again with this llmc")
    if file_bytes != n_bytes:
        fact = f"the artifact is truncated or padded: {n_bytes} bytes of {file_bytes}"
        raise LlmcError(fact, place=str(path), hint=COMPILE_AGAIN)
    if not 1 <= n_sections <= MAX_SECTIONS or offset + n_sections * SECTION.size != n_bytes - TRAILER.size:
        raise _bad_directory(path, "its size does not fit the file")
    directory = _read_at(path, descriptor, n_sections * SECTION.size, offset)
    if hashlib.sha256(directory).digest() != sha256:
        raise _bad_directory(path, "it is not what was written")
    return _check_sections(path, directory, offset)


def _check_sections(path: Path, directory: bytes, end: int) -> dict[str, Section]:
    """Sections in file order, aligned, apart from each other, before `end`, with distinct names."""
    sections: dict[str, Section] = {}
    at = 0
    for raw_name, offset, n_bytes, sha256 in struct.iter_unpack(SECTION.format, directory):
        name = raw_name.rstrip(b"\0").decode("ascii", "replace")
        alignment = WEIGHTS_ALIGNMENT if is_weights(name) else SECTION_ALIGNMENT
        if not name.replace(".", "_").isidentifier() or name in sections:
            raise _bad_directory(path, f"section name {name!r} is not valid, or given twice")
        if offset % alignment or offset < at or n_bytes > end - offset:
            raise _bad_directory(path, f"section {name!r} lies outside the file or over another")
        sections[name] = Section(name, offset, n_bytes, sha256)
        at = offset + n_bytes
    missing = [name for name in REQUIRED_SECTIONS if name not in sections]
    if missing:
        raise _bad_directory(path, f"section {missing[0]!r} is missing")
    if sections["code"].offset != 0:
        raise _bad_directory(path, "section 'code' is not at the start of the file")
    return sections


def _bad_directory(path: Path, reason: str) -> LlmcError:
    return LlmcError(f"the artifact is damaged: section directory: {reason}", place=str(path), hint=COMPILE_AGAIN)


def _not_an_artifact(path: Path, descriptor: int) -> LlmcError:
    """An artifact cut short has lost its trailer, but its code still names the one symbol that artifacts export."""
    head = _read_at(path, descriptor, 16 * READ_BYTES, 0)
    if head.startswith(ELF_MAGIC) and b"llmc_get_api\0" in head:
        fact = "the artifact is truncated or stripped: its end is missing"
        return LlmcError(fact, place=str(path), hint=COMPILE_AGAIN)
    return LlmcError("this is not an artifact", place=str(path), hint="give the artifact.so that llmc compile wrote")

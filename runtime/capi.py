"""include/llmc.h in ctypes: the structs, the function table, and the library that holds them.

An artifact is loaded through its open file (/proc/self/fd/N), not through its path: what was hashed is what runs,
even when a new artifact takes the path meanwhile, and the loader, which knows files by their names, cannot mistake one
for the other.  It knows them by inode as well, so one library serves all models of one file; it goes with the last.
"""

from __future__ import annotations

import ctypes as c
import os
import platform
import re
import threading
from _ctypes import dlclose
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import How

API_VERSION = 1
Status = c.c_int
Handle = c.c_void_p
Floats = c.POINTER(c.c_float)
RUN_ON = {"any": 0, "cpu": 1, "cuda": 2}
"""LLMC_ON_*"""
NO_MEMORY = 4
"""LLMC_ERROR_MEMORY"""
Progress = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_uint64, c.c_uint64)


class Options(c.Structure):
    """llmc_options"""

    _fields_ = (
        ("size", c.c_uint32),
        ("n_threads", c.c_int32),
        ("kv_tokens", c.c_uint64),
        ("device", c.c_int32),
        ("progress", Progress),
        ("context", c.c_void_p),
        ("run_on", c.c_int32),
        ("n_slots", c.c_uint32),
    )


class Info(c.Structure):
    """llmc_info"""

    _fields_ = (
        ("size", c.c_uint32),
        ("n_vocab", c.c_int32),
        ("n_context", c.c_int32),
        ("n_threads", c.c_int32),
        ("max_step_tokens", c.c_int32),
        ("bos_token", c.c_int32),
        ("weight_bytes", c.c_uint64),
        ("kv_bytes_per_token", c.c_uint64),
        ("kv_tokens", c.c_uint64),
        ("kv_tokens_free", c.c_uint64),
        ("device", c.c_char_p),
        ("program", c.c_int32),
        ("page_tokens", c.c_int32),
        ("sampling_bytes", c.c_uint32),
        ("n_slots", c.c_uint32),
        ("n_slots_free", c.c_uint32),
        ("slot_bytes", c.c_uint64),
        ("n_tokens", c.c_int32),
        ("is_whole", c.c_int32),
        ("n_types", c.c_int32),
        ("n_adapters", c.c_int32),
        ("n_row", c.c_int32),
        ("tile", c.c_int32 * 3),
        ("n_tile_rows", c.c_int32),
        ("picture_rows", c.c_uint32),
        ("n_rows", c.c_uint64),
        ("patch", c.c_uint32),
        ("merge", c.c_uint32),
        ("most_rows", c.c_uint32),
        ("reserved", c.c_uint32),
    )


class Bias(c.Structure):
    """llmc_bias"""

    _fields_ = (("token", c.c_int32), ("value", c.c_float))


class Sampling(c.Structure):
    """llmc_sampling"""

    _fields_ = (
        ("size", c.c_uint32),
        ("temperature", c.c_float),
        ("top_k", c.c_int32),
        ("top_p", c.c_float),
        ("seed", c.c_uint64),
        ("allowed", c.c_void_p),
        ("biases", c.POINTER(Bias)),
        ("n_biases", c.c_uint32),
        ("min_p", c.c_float),
        ("tokens", c.c_void_p),
        ("n_tokens", c.c_uint32),
        ("n_prompt", c.c_uint32),
        ("repetition_penalty", c.c_float),
        ("frequency_penalty", c.c_float),
        ("presence_penalty", c.c_float),
        ("reserved", c.c_uint32),
    )


class SampleInput(c.Structure):
    """llmc_sample_input"""

    _fields_ = (("sequence", Handle), ("how", c.POINTER(Sampling)), ("token", c.c_int32))


class AdvanceInput(c.Structure):
    """llmc_advance_input"""

    _fields_ = (("sequence", Handle), ("how", c.POINTER(Sampling)), ("token", c.c_int32))


class SpeculateInput(c.Structure):
    """llmc_speculate_input"""

    _fields_ = (
        ("sequence", Handle),
        ("how", c.POINTER(Sampling)),
        ("tokens", c.c_void_p),
        ("n_tokens", c.c_size_t),
        ("n_guesses", c.c_size_t),
        ("allowed", c.c_void_p),
        ("logits", c.c_void_p),
        ("n_right", c.c_size_t),
    )


class StepInput(c.Structure):
    """llmc_step_input"""

    _fields_ = (("sequence", Handle), ("tokens", c.c_void_p), ("n_tokens", c.c_size_t), ("logits", c.c_void_p))


class Event(c.Structure):
    """llmc_event"""

    _fields_ = (
        ("start_ns", c.c_uint64),
        ("end_ns", c.c_uint64),
        ("run", c.c_uint32),
        ("call", c.c_uint32),
        ("task", c.c_uint32),
        ("thread", c.c_uint32),
    )


class Profile(c.Structure):
    """llmc_profile"""

    _fields_ = (
        ("size", c.c_uint32),
        ("capacity", c.c_uint64),
        ("n_events", c.c_uint64),
        ("n_lost", c.c_uint64),
        ("events", c.c_void_p),
    )


class Api(c.Structure):
    """llmc_api, in the order of the header.  Functions after `sample` are there if `size` reaches so far."""

    _fields_ = (
        ("size", c.c_uint32),
        ("version", c.c_uint32),
        ("last_error", c.CFUNCTYPE(c.c_char_p)),
        ("open", c.CFUNCTYPE(Status, c.POINTER(Options), c.POINTER(Handle))),
        ("close", c.CFUNCTYPE(None, Handle)),
        ("info", c.CFUNCTYPE(Status, Handle, c.POINTER(Info))),
        ("is_eos", c.CFUNCTYPE(c.c_int, Handle, c.c_int32)),
        ("token_text", c.CFUNCTYPE(Status, Handle, c.c_int32, c.POINTER(c.c_void_p), c.POINTER(c.c_size_t))),
        ("sequence_new", c.CFUNCTYPE(Status, Handle, c.POINTER(Handle))),
        ("sequence_fork", c.CFUNCTYPE(Status, Handle, c.POINTER(Handle))),
        ("sequence_free", c.CFUNCTYPE(None, Handle)),
        ("sequence_length", c.CFUNCTYPE(c.c_int32, Handle)),
        ("sequence_truncate", c.CFUNCTYPE(Status, Handle, c.c_int32)),
        ("step", c.CFUNCTYPE(Status, Handle, c.POINTER(StepInput), c.c_size_t)),
        ("feed", c.CFUNCTYPE(Status, Handle, c.c_void_p, c.c_size_t)),
        ("logits", c.CFUNCTYPE(Status, Handle, c.POINTER(c.POINTER(c.c_float)))),
        ("sample", c.CFUNCTYPE(Status, Handle, c.POINTER(Sampling), c.POINTER(c.c_int32))),
        ("profile", c.CFUNCTYPE(Status, Handle, c.POINTER(Profile))),
        ("sequence_repeat", c.CFUNCTYPE(Status, Handle, c.c_int32, c.POINTER(Handle))),
        ("sample_many", c.CFUNCTYPE(Status, Handle, c.POINTER(SampleInput), c.c_size_t)),
        ("advance", c.CFUNCTYPE(Status, Handle, c.POINTER(AdvanceInput), c.c_size_t)),
        ("speculate", c.CFUNCTYPE(Status, Handle, c.POINTER(SpeculateInput), c.c_size_t)),
        ("sequence_save", c.CFUNCTYPE(Status, Handle, c.c_char_p, c.c_char_p, c.c_size_t)),
        ("sequence_restore", c.CFUNCTYPE(Status, Handle, c.c_char_p, c.POINTER(Handle))),
        ("sequence_tokens", c.CFUNCTYPE(Status, Handle, c.POINTER(c.POINTER(c.c_int32)))),
        ("sequence_note", c.CFUNCTYPE(Status, Handle, c.POINTER(c.c_void_p), c.POINTER(c.c_size_t))),
        ("adapter_name", c.CFUNCTYPE(Status, Handle, c.c_int32, c.POINTER(c.c_char_p))),
        ("sequence_set_adapter", c.CFUNCTYPE(Status, Handle, c.c_int32)),
        ("sequence_adapter", c.CFUNCTYPE(c.c_int32, Handle)),
        ("rows_new", c.CFUNCTYPE(Status, Handle, c.c_void_p, c.c_size_t, c.POINTER(c.c_int32))),
        ("rows_free", c.CFUNCTYPE(Status, Handle, c.c_int32)),
        ("rows_numbers", c.CFUNCTYPE(Status, Handle, c.c_int32, c.POINTER(Floats), c.POINTER(c.c_size_t))),
        ("image_rows", c.CFUNCTYPE(Status, Handle, c.c_void_p, c.POINTER(c.c_int32), c.POINTER(c.c_size_t))),
        (
            "picture_rows",
            c.CFUNCTYPE(
                Status, Handle, c.c_void_p, c.c_uint32, c.c_uint32, c.POINTER(c.c_int32), c.POINTER(c.c_size_t)
            ),
        ),
        ("rows_in_grid", c.CFUNCTYPE(Status, Handle, c.c_void_p, c.c_uint32, c.c_uint32, c.POINTER(c.c_int32))),
    )


class Device(NamedTuple):
    """Which program to open, and for a GPU which one: run_on and device of llmc_options."""

    run_on: int
    device: int

    @classmethod
    def parse(cls, device: int | str | None) -> Device:
        """None, "cpu", "cuda", "cuda:1", or a GPU's number.  Raises LlmcError."""
        found = re.fullmatch(r"|cpu|cuda|(?:cuda:)?(\d{1,6})", "" if device is None else str(device))
        if found is None:
            hint = "cpu, cuda, cuda:1, or the number of a GPU"
            raise LlmcError(f"there is no device {device!r}", place="device", hint=hint)
        return cls(RUN_ON.get(found[0].partition(":")[0], RUN_ON["any"]), int(found[1]) + 1 if found[1] else 0)


ANY = Device(RUN_ON["any"], 0)
LEAST_API_BYTES = Api.profile.offset


def as_int32(token: int) -> int:
    """A token as the runtime takes it: what is no int32 is out of range as the nearest one is, where ctypes would cut
    its bits off."""
    return max(-1, min(token, 0x7FFFFFFF))


def has(api: Api, function: str) -> bool:
    """Whether an artifact's table reaches so far, and has the function."""
    entry = getattr(Api, function)
    return api.size >= entry.offset + entry.size and bool(getattr(api, function))


def check_has(api: Api, function: str, doing: str, place: str) -> None:
    """Raise LlmcError for an artifact that is older than a function."""
    if not has(api, function):
        fact, hint = f"the artifact's runtime cannot {doing}", "compile the model again with this llmc"
        raise LlmcError(fact, place=place, hint=hint)


def sampling(how: How) -> Sampling:
    """llmc_sampling of these settings.  how has to live as long."""
    raw = Sampling(c.sizeof(Sampling), how.temperature, how.top_k, how.top_p, how.seed)
    if how.is_plain:
        return raw
    raw.min_p, raw.repetition_penalty = how.min_p, how.repetition_penalty
    raw.frequency_penalty, raw.presence_penalty = how.frequency_penalty, how.presence_penalty
    if how.allowed is not None:
        raw.allowed = how.allowed.ctypes.data
    if how.logit_bias:
        raw.biases, raw.n_biases = biases(how.logit_bias), len(how.logit_bias)
    if how.history is not None:
        raw.tokens, raw.n_tokens, raw.n_prompt = how.history.ids.ctypes.data, how.history.n, how.history.n_prompt
    return raw


@lru_cache(maxsize=64)
def biases(given: tuple[tuple[int, float], ...]) -> c.Array[Bias]:
    return (Bias * len(given))(*(Bias(token, value) for token, value in given))


def pointer_to(how: How) -> Any:
    """The same to point at; None for greedy ones that ask for no more.  how has to live as long."""
    if not how.is_plain:
        return c.pointer(sampling(how))
    return _pointer_to(how) if how.temperature else None


@lru_cache(maxsize=256)
def _pointer_to(how: How) -> Any:
    return c.pointer(sampling(how))


@contextmanager
def reporting(options: Options, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Let `open` report; what the callback raises stops it, and is raised here."""
    raised: list[BaseException] = []

    def report(_: int | None, done: int, total: int) -> int:
        try:
            if progress is not None:
                progress(done, total)
        except BaseException as error:
            raised.append(error)
        return len(raised)

    if progress is None:
        yield
        return
    options.progress = Progress(report)
    try:
        yield
    except LlmcError:
        if raised:
            raise raised[0] from None
        raise


ELF_MACHINE_AT, ARCHITECTURES = 18, {62: "x86_64", 183: "aarch64"}
"""Where an ELF file says what its code is for, and how Python calls that."""


def check_architecture(file: ArtifactFile) -> None:
    """Raise LlmcError for code of another architecture than this machine's; only where one knows both."""
    made_for = ARCHITECTURES.get(int.from_bytes(os.pread(file.descriptor, 2, ELF_MACHINE_AT), "little"))
    here = platform.machine()
    if made_for is not None and here in ARCHITECTURES.values() and here != made_for:
        fact = f"this artifact's code is for {made_for}, and this machine is one of {here}"
        raise LlmcError(fact, place=str(file.path), hint="compile the model with --target cpu on this machine")


class Library:
    """The code of one artifact in this process.  Each `of` is paired with a `release`."""

    _loaded: dict[tuple[int, int], Library] = {}  # noqa: RUF012  (by device and inode, for the whole process)
    _lock = threading.Lock()

    def __init__(self, file: ArtifactFile) -> None:
        check_architecture(file)
        self.path = file.path
        self._n_users = 0
        self._state = _file_state(file.descriptor)
        self._descriptor = os.dup(file.descriptor)  # the runtime opens its own file by this name for each model
        name = f"/proc/self/fd/{self._descriptor}"
        self._name = name if os.path.exists(name) else str(file.path.absolute())
        try:
            self._code = c.CDLL(self._name, mode=os.RTLD_NOW | os.RTLD_LOCAL)
        except OSError as error:
            os.close(self._descriptor)
            reason = str(error).removeprefix(f"{self._name}: ")
            hint = (
                "its file system may forbid programs (noexec): copy it elsewhere" if "map segment" in reason else None
            )
            raise LlmcError(
                f"the artifact's code cannot be loaded: {reason}", place=str(self.path), hint=hint
            ) from None

    @classmethod
    def of(cls, file: ArtifactFile) -> Library:
        """The library of this file.  Raises LlmcError when the file was written over while it is in use."""
        status = os.fstat(file.descriptor)
        key = status.st_dev, status.st_ino
        with cls._lock:
            library = cls._loaded.get(key)
            if library is None:
                library = cls._loaded[key] = cls(file)
            elif library._state != _file_state(file.descriptor):
                fact = "the artifact was written over while this process has it loaded"
                raise LlmcError(fact, place=str(file.path), hint="write to a new file, or load it in a new process")
            library._n_users += 1
            return library

    def release(self) -> None:
        """One user less.  Without users the code leaves the process, unless the loader holds on to it."""
        with self._lock:
            self._n_users -= 1
            if self._n_users:
                return
            dlclose(self._code._handle)
            try:
                c.CDLL(self._name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            except OSError:  # gone, as it should be
                Library._loaded = {key: other for key, other in self._loaded.items() if other is not self}
                os.close(self._descriptor)

    @cached_property
    def api(self) -> Api:
        """The artifact's function table."""
        get_api = getattr(self._code, "llmc_get_api", None)
        table = None
        if get_api is not None:
            get_api.argtypes, get_api.restype = (c.c_uint32,), c.POINTER(Api)
            table = get_api(API_VERSION)
        if not table or table.contents.version != API_VERSION or table.contents.size < LEAST_API_BYTES:
            fact = f"the artifact's runtime does not have version {API_VERSION} of the interface"
            raise LlmcError(fact, place=str(self.path), hint="compile the model again with this llmc")
        return table.contents  # type: ignore[no-any-return]

    def check(self, status: int) -> None:
        """Raise what last_error() says when a call has failed."""
        if status == 0:
            return
        text = (self.api.last_error() or b"").decode("utf-8", "replace").replace(self._name, str(self.path))
        fact, place, hint = f"the runtime failed with status {status}", str(self.path), None
        for index, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
            if index == 0:
                fact = line.removeprefix("error: ")
            elif line.startswith("hint: "):
                hint = line.removeprefix("hint: ")
            else:
                place = line.removeprefix("at: ")
        raise LlmcError(fact, place=place, hint=hint, status=status)


def _file_state(descriptor: int) -> tuple[int, int]:
    """What changes when a file is written over: its size and the time of the last write."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns

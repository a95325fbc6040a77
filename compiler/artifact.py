"""Write an artifact: the linked code, then the sections behind it, then the directory and the trailer.

Everything is streamed: no more than one weight is in memory at a time. docs/artifact.md describes the format.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from llmc.compiler.kernel import Kernel
from llmc.compiler.plan import PlacedWeight, Program
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.compiler.target import Target
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ELF_MAGIC
from llmc.runtime.errors import LlmcError

Progress = Callable[[int, int], None]

HUGE_PAGE_BYTES = 2 << 20
PARTIAL = re.compile(r"\..+\.\d+\.partial")


class ArtifactWriter:
    """Writes sections in order to a temporary file beside `path`; `publish` gives it its name.

    Used as a context manager: leaving it without `publish` removes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.sections: list[fmt.Section] = []

    def __enter__(self) -> ArtifactWriter:
        with self.reporting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_locked(self.partial)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # on a full disk closing fails too, and it is said already
                self.file.close()
        finally:
            self.partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn what the file system refuses into one clear line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "free some space, or choose another place with -o"
                raise LlmcError("the disk is full", place=str(self.path), hint=hint) from error
            raise LlmcError(f"cannot write the artifact: {error.strerror}", place=str(self.path)) from error

    def add(self, name: str, chunks: Iterator[bytes | memoryview], alignment: int = fmt.SECTION_ALIGNMENT) -> None:
        """Append a section."""
        with self.reporting():
            end = self.file.tell()
            offset = -(-end // alignment) * alignment
            self.file.write(bytes(offset - end))
            digest = hashlib.sha256()
            for piece in in_huge_pages(chunks, offset):
                digest.update(piece)
                self.file.write(piece)
            self.sections.append(fmt.Section(name, offset, self.file.tell() - offset, digest.digest()))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """The manifest, the directory and the trailer; again, to replace the manifest."""
        with self.reporting():
            if self.sections and self.sections[-1].name == "manifest":
                self.file.truncate(self.sections.pop().offset)
                self.file.seek(0, os.SEEK_END)
        self.add("manifest", iter([json.dumps(manifest, indent=1).encode()]))
        directory = b"".join(fmt.SECTION.pack(s.name.encode(), s.offset, s.n_bytes, s.sha256) for s in self.sections)
        with self.reporting():
            end = self.file.tell()
            offset = -(-end // fmt.SECTION_ALIGNMENT) * fmt.SECTION_ALIGNMENT
            size = offset + len(directory) + fmt.TRAILER.size
            digest = hashlib.sha256(directory).digest()
            version = manifest.get("format_version", fmt.FORMAT_VERSION)
            trailer = fmt.TRAILER.pack(fmt.TRAILER_MAGIC, version, len(self.sections), offset, size, digest)
            self.file.write(bytes(offset - end) + directory + trailer)
            self.file.flush()

    def publish(self) -> None:
        """Give the finished file its name, replacing what stood there."""
        with self.reporting():
            self.partial.chmod(0o755)
            self.partial.replace(self.path)


def partial_path(path: Path) -> Path:
    """Where an artifact is while it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def open_locked(path: Path) -> BinaryIO:
    """The file, made anew, and locked for as long as it is open: remove_abandoned leaves it alone."""
    while True:
        file = path.open("w+b")
        with contextlib.suppress(OSError):  # a file system without locks: nothing is ever removed there
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # removed before it was locked


def remove_abandoned(folder: Path) -> None:
    """Remove artifacts that were being written when their process was killed: no process, on whatever machine, has
    locked them."""
    for path in folder.glob(".*.partial"):
        if PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if file.read(len(ELF_MAGIC)) in (b"", ELF_MAGIC):
                    path.unlink()


def check_place(path: Path, model: Path | None = None) -> Path:
    """Refuse, before any work is done, a path to which no artifact can be written, and a file that must not be
    replaced.

    model: the folder of the model, whose files must not be.
    """
    if os.path.isdir(path):  # unlike Path's own it is False too for what can be no name
        raise LlmcError("the output is a directory", place=f"-o {path}", hint=f"name a file: -o {path / 'model.so'}")
    if too_long(path):
        raise LlmcError("the output's name is too long", place=f"-o {path}", hint="choose another with -o")
    if model and path.is_file() and path.resolve().is_relative_to(model.resolve()) and not is_artifact(path):
        fact = "the output is a file of the model, which an artifact would replace"
        raise LlmcError(fact, place=f"-o {path}", hint=f"name another: -o {path.with_suffix('.so')}")
    if path.exists() and not path.is_file():
        raise LlmcError("the output is a device or a pipe, which an artifact would replace", place=f"-o {path}")
    folder = existing_folder(path)
    if not folder.is_dir():
        raise LlmcError(f"the artifact cannot be written: {folder} is not a folder", place=f"-o {path}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LlmcError(f"the artifact cannot be written: no permission to write in {folder}", place=f"-o {path}")
    return path


def too_long(path: Path) -> bool:
    """Whether the system has no room for such a name, or for that of the artifact while it is written."""
    try:
        partial_path(path).exists()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def is_artifact(path: Path) -> bool:
    """Whether the file ends as an artifact does."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - fmt.TRAILER.size))
        return file.read(len(fmt.TRAILER_MAGIC)) == fmt.TRAILER_MAGIC


def existing_folder(path: Path) -> Path:
    """The folder that `path` will be made in, or the nearest one above it that there is."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def in_huge_pages(chunks: Iterable[bytes | memoryview], position: int) -> Iterator[bytes | memoryview]:
    """The same bytes, cut where the file's huge pages end.  `position`: in the file, of the first.

    Linux keeps what was written in pages of up to a write's size.  Weights that were written in whole huge pages are
    mapped in huge pages, and read about a tenth faster than in small ones.
    """
    waiting = bytearray()
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            here = position + len(waiting)
            end = here + len(rest)
            whole = end // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES - here
            if waiting or whole <= 0:
                whole = min(HUGE_PAGE_BYTES - here % HUGE_PAGE_BYTES, len(rest))
                waiting += rest[:whole]
                if (here + whole) % HUGE_PAGE_BYTES == 0:
                    position += len(waiting)
                    yield bytes(waiting)
                    waiting.clear()
            else:
                position += whole
                yield rest[:whole]
            rest = rest[whole:]
    if waiting:
        yield bytes(waiting)


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.{0 if n_bytes >= 10e6 else 2}f} MB"


def check_room(path: Path, n_bytes: int) -> None:
    """Refuse before hours of work what will not fit on the disk; what killed processes left there makes room."""
    folder = existing_folder(path)
    remove_abandoned(folder)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise LlmcError(
            f"the artifact needs {megabytes(n_bytes)}, but the disk has {megabytes(free)} free",
            place=str(path),
            hint="free some space, or choose another place with -o",
        )


def packed_weights(weights: Sequence[PlacedWeight], progress: Progress) -> Iterator[memoryview]:
    """The weights section, a weight at a time.  A weight that lies there in several layouts is read once."""
    position, total = 0, sum(weight.n_bytes for weight in weights)
    array: Any = None
    read: ir.Value | None = None
    for weight in weights:
        if weight.offset > position:
            yield memoryview(bytes(weight.offset - position))
        if weight.value is not read:
            array = None  # the last one goes before the next comes
            array, read = read_constant(weight), weight.value
        packed = weight.layout.pack(array).reshape(-1).view(np.uint8).data
        if packed.nbytes != weight.n_bytes:
            raise AssertionError(
                f"{weight.value.name}: {weight.layout} gave {packed.nbytes} bytes, not {weight.n_bytes}"
            )
        yield packed
        position = weight.offset + weight.n_bytes
        progress(position, total)


def read_constant(weight: PlacedWeight) -> Any:
    """The constant's array in the dtype it is stored in; codes and scales when it is quantised."""
    tensor: Any = weight.value.const_value
    if isinstance(tensor, QuantizedWeight):
        return tensor.quantized()
    return tensor.stored() if hasattr(tensor, "stored") else tensor.numpy()


def encode_plan(program: Program, target: Target, eos: Sequence[int], bos: int) -> bytes:
    """The plan section: see llmc_plan_header."""
    calls: list[bytes] = []
    arguments: list[bytes] = []
    plans: list[bytes] = []
    for plan in program.plans:
        plans.append(fmt.PLAN_RECORD.pack(plan.kind, plan.n_rows, len(calls), len(plan.calls)))
        for call in plan.calls:
            calls.append(fmt.CALL_RECORD.pack(call.kernel, call.grid, len(arguments), len(call.arguments)))
            arguments += [fmt.ARGUMENT.pack(a.space, 0, a.offset, a.n_bytes) for a in call.arguments]
    pointers = pointer_counts(program)
    kernels = [fmt.pack_kernel(kernel_record(i, k, pointers[i], target)) for i, k in enumerate(program.kernels)]
    features = sum(fmt.CPU_FEATURES[feature] for feature in target.features)
    header = fmt.PlanHeader(
        cpu_features=features,
        n_vocab=program.n_vocab,
        n_context=program.n_context,
        page_tokens=program.page_tokens,
        pages_per_sequence=program.pages_per_sequence,
        n_kernels=len(kernels),
        n_plans=len(plans),
        n_calls=len(calls),
        n_arguments=len(arguments),
        eos=tuple(eos[: fmt.MAX_EOS]),
        bos=bos,
        default_kv_tokens=program.default_kv_tokens,
        kv_page_bytes=program.kv_page_bytes,
        arena_bytes=program.arena_bytes,
        scratch_bytes=program.scratch_bytes,
        device=fmt.DEVICES.index(target.kind),
        cuda_arch=cuda_arch(target),
        slot_bytes=program.slot_bytes,
        default_slots=program.default_slots,
        n_tokens=program.n_tokens,
        is_whole=program.is_whole,
        n_types=program.n_types,
        adapters=program.adapters,
        n_row=program.n_row,
        tile=program.tile,
        picture_rows=program.picture_rows,
        is_turned=program.is_turned,
        sized=program.sized,
    )
    return fmt.pack_plan_header(header) + b"".join([*kernels, *plans, *calls, *arguments])


def kernel_record(index: int, kernel: Kernel, n_pointers: int, target: Target) -> fmt.KernelRecord:
    """What the runtime must know of a kernel; a GPU's kernel is its own image."""
    if target.kind == "cpu":
        return fmt.KernelRecord(kernel.name, n_pointers)
    flags = fmt.KERNEL_DEPENDENT if kernel.dependent else 0
    return fmt.KernelRecord(kernel.name, n_pointers, kernel.n_threads, kernel.shared_bytes, flags, index)


def cuda_arch(target: Target) -> int:
    if target.kind == "cpu":
        return 0
    return target.arch | (fmt.CUDA_EXACT if target.level.endswith("a") else 0)


def pointer_counts(program: Program) -> dict[int, int]:
    """How many pointers each kernel takes, by its index."""
    counts: dict[int, int] = {}
    for plan in program.plans:
        for call in plan.calls:
            if counts.setdefault(call.kernel, len(call.arguments)) != len(call.arguments):
                raise AssertionError(f"{program.kernels[call.kernel].name} is called with different operand counts")
    return counts


def encode_vocabulary(vocabulary: Sequence[bytes]) -> bytes:
    """The vocabulary section: u32 n, u32 offsets[n + 1], then the bytes of each token's text."""
    offsets = [0]
    for text in vocabulary:
        offsets.append(offsets[-1] + len(text))
    return struct.pack(f"<{len(offsets) + 1}I", len(vocabulary), *offsets) + b"".join(vocabulary)

"""Write an artifact: the linked code, then the sections behind it, then the directory and the trailer.

Everything is streamed: no more than one weight is in memory at a time. docs/artifact.md describes the format.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.compiler.plan import PlacedWeight, Program
from llmc.compiler.target import Target
from llmc.runtime import format as fmt
from llmc.runtime.errors import LlmcError

Progress = Callable[[int, int], None]


class ArtifactWriter:
    """Writes sections in order to a temporary file beside `path`; `publish` gives it its name.

    Used as a context manager: leaving it without `publish` removes the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self.sections: list[fmt.Section] = []

    def __enter__(self) -> ArtifactWriter:
        with self.reporting():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = self.partial.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
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
            for chunk in chunks:
                digest.update(chunk)
                self.file.write(chunk)
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
            trailer = fmt.TRAILER.pack(fmt.TRAILER_MAGIC, fmt.FORMAT_VERSION, len(self.sections), offset, size, digest)
            self.file.write(bytes(offset - end) + directory + trailer)
            self.file.flush()

    def publish(self) -> None:
        """Give the finished file its name, replacing what stood there."""
        with self.reporting():
            self.partial.chmod(0o755)
            self.partial.replace(self.path)


def check_room(path: Path, n_bytes: int) -> None:
    """Refuse before hours of work what will not fit on the disk."""
    folder = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise LlmcError(
            f"the artifact needs {n_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free",
            place=str(path),
            hint="free some space, or choose another place with -o",
        )


def packed_weights(weights: Sequence[PlacedWeight], progress: Progress) -> Iterator[memoryview]:
    """The weights section, a weight at a time."""
    position, total = 0, sum(weight.n_bytes for weight in weights)
    for weight in weights:
        if weight.offset > position:
            yield memoryview(bytes(weight.offset - position))
        packed = weight.layout.pack(read_constant(weight)).reshape(-1).view(np.uint8).data
        if packed.nbytes != weight.n_bytes:
            raise AssertionError(
                f"{weight.value.name}: {weight.layout} gave {packed.nbytes} bytes, not {weight.n_bytes}"
            )
        yield packed
        position = weight.offset + weight.n_bytes
        progress(position, total)


def read_constant(weight: PlacedWeight) -> Any:
    """The constant's array in the dtype it is stored in."""
    tensor: Any = weight.value.const_value
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
    kernels = [fmt.KERNEL_RECORD.pack(k.name.encode(), pointers[i], 0) for i, k in enumerate(program.kernels)]
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
        default_kv_tokens=program.n_context,
        kv_page_bytes=program.kv_page_bytes,
        arena_bytes=program.arena_bytes,
        scratch_bytes=program.scratch_bytes,
    )
    return fmt.pack_plan_header(header) + b"".join([*kernels, *plans, *calls, *arguments])


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

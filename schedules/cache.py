"""Compiled kernels on disk, so that nothing is compiled twice.

A kernel's object file (for a GPU, its cubin) depends on its key, its name, the target, the source of this package and
the versions of TVM and of the CUDA compiler; that text is hashed for the file's name, stored whole in the file, and
compared when the file is read.  With every kernel in the cache TVM is not even imported.  A folder that cannot be
written means no cache, and nothing worse.

An entry:    "llmc kernel 1\n" | u32 length, key text | sha256 of the object | the object file
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target

MAGIC = b"llmc kernel 1\n"

KERNELS_PER_WORKER = 16
"""Another process is started for every so many kernels: it needs about as long to import TVM."""

Progress = Callable[[int, int], None]


def folder() -> Path:
    """$LLMC_CACHE, or kernels/ in llmc's part of the user's cache."""
    if chosen := os.environ.get("LLMC_CACHE"):
        return Path(chosen).absolute()  # the linker works in a folder of its own
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "llmc", "kernels")


def compile_kernels(kernels: Sequence[Kernel], target: Target, progress: Progress | None = None) -> list[bytes]:
    """The object file of each kernel, from the cache or compiled; `progress(done, total)` after each."""
    distinct = {kernel.name: kernel for kernel in kernels}
    objects = {name: code for name, kernel in distinct.items() if (code := load(kernel, target)) is not None}
    missing = [kernel for name, kernel in distinct.items() if name not in objects]
    if progress:
        progress(len(objects), len(distinct))
    for kernel, code in _compile(missing, target):
        store(kernel, target, code)
        objects[kernel.name] = code
        if progress:
            progress(len(objects), len(distinct))
    return [objects[kernel.name] for kernel in kernels]


def load(kernel: Kernel, target: Target) -> bytes | None:
    """The kernel's object file, if the cache holds it, whole and for exactly this key."""
    text = key_text(kernel, target)
    try:
        entry = _path(text).read_bytes()
    except OSError:
        return None
    head = MAGIC + struct.pack("<I", len(text)) + text
    if not entry.startswith(head):
        return None
    digest, code = entry[len(head) : len(head) + 32], entry[len(head) + 32 :]
    return code if hashlib.sha256(code).digest() == digest else None


def store(kernel: Kernel, target: Target, code: bytes) -> None:
    """Puts an object file into the cache, whole or not at all."""
    text = key_text(kernel, target)
    path = _path(text)
    entry = b"".join([MAGIC, struct.pack("<I", len(text)), text, hashlib.sha256(code).digest(), code])
    with contextlib.suppress(OSError):  # no room, no right to write: no cache
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(entry)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def key_text(kernel: Kernel, target: Target) -> bytes:
    """Everything that the object file depends on."""
    lines = [kernel.name, kernel.key, str(target), f"tvm {_tvm_version()}", f"schedules {_source_digest('*.py')}"]
    if target.kind == "cuda":
        from llmc.schedules.cuda.compile import compiler

        lines += [compiler().version, f"headers {_source_digest('*.cuh')}"]
    return "\n".join(lines).encode()


def _path(text: bytes) -> Path:
    return folder() / f"{hashlib.sha256(text).hexdigest()}.kernel"


@functools.cache
def _tvm_version() -> str:
    return importlib.metadata.version("apache-tvm")


@functools.cache
def _source_digest(pattern: str) -> str:
    """A hash of every file of this package with such a name."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob(pattern)):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(here).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _compile(kernels: Sequence[Kernel], target: Target) -> Iterator[tuple[Kernel, bytes]]:
    """Each kernel with its object file, in any order.  Raises what compiling raised."""
    if target.kind == "cuda":
        from llmc.schedules.cuda import compile as cuda

        yield from cuda.compile_kernels(kernels, target)
        return
    n_workers = min(os.cpu_count() or 1, 1 + len(kernels) // KERNELS_PER_WORKER)
    portable, rest = _picklable(kernels) if n_workers > 1 else ([], list(kernels))
    workers = [_Worker(portable[i::n_workers], target) for i in range(1, n_workers)]
    try:
        from llmc.schedules import lower

        for kernel in [*rest, *portable[::n_workers]] if workers else rest:
            yield kernel, lower.compile_kernel(kernel, target)
        for worker in workers:
            yield from worker.answers()
    finally:
        for worker in workers:
            worker.stop()


def _picklable(kernels: Sequence[Kernel]) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels that another process can be told to build, and those that it can't."""
    portable, rest = [], []
    for kernel in kernels:
        try:
            pickle.dumps(kernel)
            portable.append(kernel)
        except (pickle.PicklingError, AttributeError, TypeError):
            rest.append(kernel)
    return portable, rest


class _Worker:
    """Another process, compiling its share."""

    def __init__(self, kernels: Sequence[Kernel], target: Target) -> None:
        self._kernels = kernels
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from llmc.schedules.lower import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's, which ends it
        )
        self._results: list[bytes | BaseException] = []
        request = pickle.dumps((list(kernels), target))
        self._reader = threading.Thread(target=self._converse, args=(request,), daemon=True)
        self._reader.start()

    def _converse(self, request: bytes) -> None:
        """Asks, and keeps the answers as they come, so that the worker never waits for a full pipe."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        try:
            with questions, answers:
                questions.write(request)
                questions.close()
                for _ in self._kernels:
                    self._results.append(pickle.load(answers))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._results.append(RuntimeError(f"a compiling process died: {error!r}"))

    def answers(self) -> Iterator[tuple[Kernel, bytes]]:
        self._reader.join()
        for kernel, result in zip(self._kernels, self._results, strict=False):
            if isinstance(result, BaseException):
                raise result
            yield kernel, result
        if len(self._results) < len(self._kernels):
            raise RuntimeError("a compiling process died")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

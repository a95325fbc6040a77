"""Kernels of CUDA C++ as shared libraries for a CPU, kept in build/cache.

A library offers, in C, what core/buffers.h says: a table of kernels, each callable with a grid and pointers.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.compile import kernel_source

HERE = Path(__file__).resolve().parent
TABLE = HERE / "core" / "table.cpp"
INCLUDE = HERE.parents[1] / "schedules" / "cuda" / "include"
ALL_HEADERS = (HERE / "include", HERE / "core", INCLUDE)
FLAGS = ("-std=c++17", "-fPIC", "-march=x86-64-v3", "-DLLMC_EMULATE")
KERNEL_FLAGS = (*FLAGS, "-Og", "-w", f"-I{HERE / 'include'}", f"-I{INCLUDE}")
"""Most of a test's time is this compiler's: -O1 takes a third longer, and -O0 longer still, for it keeps all code."""
CORE_FLAGS = (*FLAGS, "-O3", "-Wall", "-Wextra")
CHECKED_FLAGS = ("-DLLMC_EMULATE_CHECKED=true", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
"""Every load and store calls the core (core/races.cpp); ThreadSanitizer itself takes no part."""


def build_library(kernels: Sequence[Kernel], target: Target, *, checked: bool = False) -> Path:
    """A library of these kernels, each under its name; `checked`: every memory access is, at some cost of time.

    Raises LlmcError with the C++ compiler's words when a source does not compile.
    """
    distinct = {kernel.name: kernel for kernel in kernels}
    objects = [_kernel_object(kernel, target, checked) for kernel in distinct.values()]
    # The core is linked with C++'s libraries: to look through them again would take four times as long.
    return _linked([*objects, _core_object(TABLE), _core_library()], "-nodefaultlibs")


def _kernel_object(kernel: Kernel, target: Target, checked: bool) -> Path:
    source = kernel_source(kernel, target)
    flags = [*KERNEL_FLAGS, *(CHECKED_FLAGS if checked else ())]
    text = "\n".join(
        [
            '#include "emulated_cuda.h"',
            "namespace {",
            f'#line 1 "{kernel.name}.cu"',
            source,
            "}",
            f"LLMC_EMULATED_KERNEL({kernel.name}, {kernel.n_threads}, {kernel.shared_bytes}, {_cluster(source)})",
        ]
    )
    digest = _digest(*flags, text, _headers(*ALL_HEADERS))
    command = ["-c", f"-I{_prelude(tuple(flags))}", *flags, "-x", "c++", "-"]
    return _made(digest, ".o", lambda out: _compile(command, out, kernel.name, text))


def _cluster(source: str) -> int:
    """Blocks of a cluster, as the kernel says."""
    said = re.search(r"__cluster_dims__\((\d+), 1, 1\)", source)
    return int(said[1]) if said else 1


@functools.cache
def _prelude(flags: tuple[str, ...]) -> Path:
    """A folder with emulated_cuda.h compiled beforehand: most of a small kernel's time."""

    def make(out: Path) -> None:
        out.mkdir()
        header = HERE / "include" / "emulated_cuda.h"
        _compile(["-x", "c++-header", *flags, str(header)], out / "emulated_cuda.h.gch", header.name)

    return _made(_digest("prelude", *flags, _headers(HERE / "include")), ".headers", make)


@functools.cache
def _core_library() -> Path:
    """What all libraries of kernels share: one for the process."""
    return _linked([_core_object(path) for path in sorted(HERE.glob("core/*.cpp")) if path != TABLE])


def _linked(parts: Sequence[Path], *flags: str) -> Path:
    digest = _digest("link", *flags, *(path.name for path in parts))
    return _made(digest, ".so", lambda out: _compile(["-shared", *flags, *map(str, parts)], out, "the emulator"))


def _core_object(path: Path) -> Path:
    digest = _digest(*CORE_FLAGS, path.name, path.read_text(), _headers(*ALL_HEADERS[:2]))
    return _made(digest, ".o", lambda out: _compile(["-c", *CORE_FLAGS, str(path)], out, path.name))


@functools.cache
def _headers(*folders: Path) -> str:
    """A hash of everything that a source may include from these folders, and of the compiler."""
    paths = [path for folder in folders for path in sorted([*folder.glob("*.h"), *folder.glob("*.cuh")])]
    return _digest(*(path.read_text() for path in paths), _compiler_version())


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _made(digest: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file of this digest in the cache, made when it isn't there."""
    folder = Path(os.environ.get("LLMC_CACHE") or HERE.parents[1] / "build" / "cache") / "emulator"
    path = folder / f"{digest}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary, path.name)
            make(made)
            try:
                made.replace(path)
            except OSError:  # a folder that another process has just made
                if not path.exists():
                    raise
    return path


def _compile(arguments: Sequence[str], out: Path, place: str, text: str | None = None) -> None:
    answer = subprocess.run(
        ["g++", *arguments, "-o", str(out)], input=text, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise LlmcError(f"g++ refused the source:\n{answer.stderr.strip()[:4000]}", place=place)

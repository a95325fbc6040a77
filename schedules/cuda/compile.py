"""CUDA C++ to a cubin: by NVRTC from `pip install 'llmc[cuda]'`, or by an nvcc on PATH.

NVRTC is asked first: it is the same compiler, but starts no processes and reads no host headers, and takes a fifth of
nvcc's time for a small kernel.  A cubin holds one kernel for one architecture; the driver loads it as it is.  Neither a
GPU nor a driver is needed.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError

INCLUDE = Path(__file__).resolve().parent / "include"
OPTIONS = ("-std=c++17",)

N_AT_ONCE = 2
"""Kernels compiled at the same time: each takes up to some seconds of one core."""


class Compiler(Protocol):
    """Makes cubins.  `version` is part of what a compiled kernel depends on."""

    version: str

    def compile(self, name: str, source: str, target: Target) -> tuple[bytes, str]:
        """The cubin, and what the compiler had to say.  Raises LlmcError when it refuses the source."""


def compile_kernel(kernel: Kernel, target: Target) -> bytes:
    """The kernel's cubin.  Raises LlmcError when the source is refused, or when there is no compiler."""
    return compiler().compile(kernel.name, kernel_source(kernel, target), target)[0]


def compile_kernels(kernels: Sequence[Kernel], target: Target) -> Iterator[tuple[Kernel, bytes]]:
    """Each kernel with its cubin, in order, a few at a time."""
    chosen = compiler()
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        sources = [kernel_source(kernel, target) for kernel in kernels]  # TVM, where asked, works in this thread alone
        results = [
            pool.submit(chosen.compile, kernel.name, source, target)
            for kernel, source in zip(kernels, sources, strict=True)
        ]
        try:
            for kernel, result in zip(kernels, results, strict=True):
                yield kernel, result.result()[0]
        finally:
            pool.shutdown(cancel_futures=True)


def kernel_source(kernel: Kernel, target: Target) -> str:
    """The kernel's CUDA C++.  Of a PrimFunc it is what TVM writes, with the parameters in the kernel's order."""
    built = kernel.build()
    if isinstance(built, str):
        return built
    from llmc.schedules.cuda.tir_source import cuda_source  # TVM is imported only when it is needed

    source, _, n_threads = cuda_source(built, kernel.name, target)
    if n_threads != kernel.n_threads:
        fact = f"its loops are bound to {n_threads} threads, its launch says {kernel.n_threads}"
        raise LlmcError(fact, place=f"kernel {kernel.name}")
    return source


@functools.cache
def compiler() -> Compiler:
    """What this machine has to compile CUDA C++ with.  Raises LlmcError when it has nothing."""
    from llmc.schedules.cuda import nvrtc

    if found := nvrtc.find():
        return nvrtc.Nvrtc(*found)
    if path := shutil.which("nvcc"):
        return Nvcc(path)
    raise LlmcError(
        "this machine has no compiler for CUDA: neither NVRTC nor an nvcc on PATH",
        place="--target cuda",
        hint="pip install 'llmc[cuda]'",
    )


class Nvcc:
    """NVIDIA's compiler driver."""

    def __init__(self, path: str) -> None:
        self._path = path
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        self.version = answer.stdout.strip().splitlines()[-1] if answer.stdout.strip() else path

    def compile(self, name: str, source: str, target: Target) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
            text, cubin = Path(folder, f"{name}.cu"), Path(folder, f"{name}.cubin")
            text.write_text(source)
            command = [self._path, "-cubin", f"-arch={target.level}", *OPTIONS, "-O3", "-Xptxas=-v", f"-I{INCLUDE}"]
            command += [str(text), "-o", str(cubin)]
            answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            said = (answer.stdout + answer.stderr).strip()
            if answer.returncode:
                raise refused(said, name, self._path)
            return cubin.read_bytes(), said


def refused(said: str, name: str, compiler_name: str) -> LlmcError:
    return LlmcError(f"{compiler_name} refused the source:\n{said[:4000]}", place=f"kernel {name}")

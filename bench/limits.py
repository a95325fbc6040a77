"""What the machine can do at best, measured: reads of memory, multiply-adds.

On CPU by two small C files compiled for this very machine when they are first needed; on an NVIDIA GPU by PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llmc.runtime.errors import LlmcError

Read = Callable[[int, int], float]
"""(threads, bytes) -> seconds of reading a buffer of so many bytes once."""

KINDS = {"f32": 0, "bf16": 1, "int8": 2}
"""What is multiplied, as arithmetic_peak.c numbers it."""
PEAK_S = 0.3
GPU_COPY_BYTES = 1 << 30
GPU_MATRIX = 8192


def reader() -> Read:
    """read_bandwidth.c, compiled."""
    function = library("read_bandwidth").read_seconds
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_size_t]
    read: Read = function
    return read


def multiplied(dtype: str, quant: str | None) -> str:
    """What products of such weights multiply on a CPU: a key of KINDS."""
    return {None: dtype, "fp8": "bf16"}.get(quant, "int8")


def arithmetic_peak(threads: int, kind: str) -> float:
    """Operations a second of `kind` (a key of KINDS), a multiply-add counted as two; 0 where there is no such unit."""
    function = library("arithmetic_peak").operations_per_second
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    return float(function(threads, KINDS[kind], PEAK_S))


@cache
def library(name: str) -> ctypes.CDLL:
    """A C file beside this one, compiled for this machine."""
    source = Path(__file__).with_name(f"{name}.c")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory(prefix="llmc-bench-") as folder:  # what is loaded stays when its file goes
        out = Path(folder) / f"{name}.so"
        subprocess.run([*c_compiler(), *flags, str(source), "-o", str(out), "-lpthread"], check=True)
        return ctypes.CDLL(str(out))


def c_compiler() -> list[str]:
    """The compiler's own choice, or cc where only the runtime is installed."""
    try:
        from llmc.compiler.link import c_compiler as chosen
    except ModuleNotFoundError:
        return ["cc"]
    return chosen()


def gpu_copy_bandwidth() -> float:
    """Bytes a second that a copy within GPU memory reads and writes together."""
    import torch

    source = torch.empty(GPU_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * GPU_COPY_BYTES / gpu_seconds(lambda: target.copy_(source))


def gpu_arithmetic_peak() -> float:
    """Operations a second of a large bf16 matrix product."""
    import torch

    a = torch.randn(GPU_MATRIX, GPU_MATRIX, dtype=torch.bfloat16, device="cuda")
    return 2 * GPU_MATRIX**3 / gpu_seconds(lambda: a @ a)


def gpu_seconds(work: Callable[[], Any], times: int = 10) -> float:
    """The time of one run among several, after one that does not count."""
    import torch

    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_name() -> str:
    """Raises LlmcError where PyTorch, which runs beside llmc, has none."""
    import torch

    if not torch.cuda.is_available():
        hint = "measure on a machine with one, or an artifact of --target cpu"
        raise LlmcError("PyTorch finds no NVIDIA GPU on this machine", hint=hint)
    return str(torch.cuda.get_device_name())


def memory_available(device: str) -> int:
    """Bytes that a new process could have, caches of files counted as free."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

"""CUDA C++ to cubins: by whichever compiler there is, from text and from TIR, and once only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.target import CUDA_LEVELS, Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache
from llmc.schedules.cuda import compile as cuda
from llmc.schedules.cuda import nvrtc
from tests.emulator.emulate import EmulatedExecutable

TARGET = Target("cuda", "sm_90a")
DOUBLE = """
#include "device.cuh"
extern "C" __global__ void __launch_bounds__(32) twice(const bf16 *x, float *y) {
    wait_for_previous();
    y[threadIdx.x] = warp_sum(2 * to_float(x[threadIdx.x]));
}
"""


def compilers() -> dict[str, cuda.Compiler]:
    """Those that this machine has."""
    found: dict[str, cuda.Compiler] = {}
    if packages := nvrtc.find():
        found["NVRTC"] = nvrtc.Nvrtc(*packages)
    if path := shutil.which("nvcc"):
        found["nvcc"] = cuda.Nvcc(path)
    return found


needs_compiler = pytest.mark.skipif(not compilers(), reason="no CUDA compiler: pip install 'llmc[cuda]'")


@pytest.fixture(params=["NVRTC", "nvcc"])
def compiler(request: pytest.FixtureRequest) -> cuda.Compiler:
    """Each compiler of this machine."""
    if request.param not in compilers():
        pytest.skip(f"no {request.param} here")
    return compilers()[request.param]


@pytest.mark.parametrize("level", CUDA_LEVELS)
def test_a_source_becomes_an_elf_file_for_each_architecture(compiler: cuda.Compiler, level: str) -> None:
    code, _ = compiler.compile("twice", DOUBLE, Target("cuda", level))
    assert code.startswith(b"\x7fELF")
    assert b".text.twice" in code


def test_a_source_that_is_wrong_is_refused_with_the_line(compiler: cuda.Compiler) -> None:
    with pytest.raises(LlmcError, match=r'twice.cu\(5\): error: identifier "lanes_sum" is undefined') as caught:
        compiler.compile("twice", DOUBLE.replace("warp_sum", "lanes_sum"), TARGET)
    assert caught.value.place == "kernel twice"


def test_without_a_compiler_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LlmcError, match="no compiler for CUDA") as caught:
        cuda.compiler.__wrapped__()
    assert caught.value.hint == "pip install 'llmc[cuda]'"


# ---- the cache


class Recorder:
    """A compiler that says what it was asked for."""

    version = "recorder 1"

    def __init__(self) -> None:
        self.names: list[str] = []

    def compile(self, name: str, source: str, target: Target) -> tuple[bytes, str]:
        self.names.append(name)
        return f"{name} for {target}".encode(), ""


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "compiler", lambda: made)
    return made


def kernels(*names: str) -> list[Kernel]:
    return [Kernel(name, f"key of {name}", lambda: DOUBLE, n_threads=32) for name in names]


def test_kernels_are_compiled_once(recorder: Recorder) -> None:
    first = cache.compile_kernels(kernels("a", "b", "a"), TARGET)
    assert cache.compile_kernels(kernels("b", "a"), TARGET) == [first[1], first[0]]
    assert sorted(recorder.names) == ["a", "b"]
    assert first[0] == first[2] == b"a for cuda:sm_90a"


def test_another_architecture_or_compiler_is_another_kernel(recorder: Recorder) -> None:
    cache.compile_kernels(kernels("a"), TARGET)
    cache.compile_kernels(kernels("a"), Target("cuda", "sm_80"))
    recorder.version = "recorder 2"
    cache.compile_kernels(kernels("a"), TARGET)
    assert recorder.names == ["a", "a", "a"]


# ---- TIR


def exponentials() -> Any:
    """b[i] = exp(a[i]) as f32 and as bf16, over 2 blocks of 64 threads, with a parameter that nothing reads."""
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def function(
        z: T.Buffer((100,), "float32"),  # type: ignore[valid-type]
        unread: T.Buffer((4,), "float32"),  # type: ignore[valid-type]
        a: T.Buffer((100,), "bfloat16"),  # type: ignore[valid-type]
    ) -> None:
        block = T.launch_thread("blockIdx.x", 2)
        thread = T.launch_thread("threadIdx.x", 64)
        with T.sblock("exponential"):
            if block * 64 + thread < 100:
                a[block * 64 + thread] = T.Cast("bfloat16", T.exp(z[block * 64 + thread]))

    return function


def exponential_kernel(n_threads: int = 64) -> Kernel:
    return Kernel("exponential", "exponentials()", exponentials, n_threads)


@needs_compiler
def test_tir_becomes_a_kernel_with_our_name_and_order_of_parameters() -> None:
    source = cuda.kernel_source(exponential_kernel(), TARGET)
    assert "exponential(float* __restrict__ z_ptr, void *unused_1, nv_bfloat16* __restrict__ a_ptr)" in source
    assert cuda.compile_kernel(exponential_kernel(), TARGET).startswith(b"\x7fELF")


def test_tir_runs_on_the_emulator() -> None:
    call = Call("Test", (TensorType((100,), "f32"), TensorType((4,), "f32")), (TensorType((100,), "bf16"),))
    operands = (Operand("input", 0), Operand("input", 1), Operand("output"))
    implementation = Implementation((Launch(exponential_kernel(), operands, grid=2),))
    z = np.linspace(-3, 3, 100, dtype=np.float32)
    (a,) = EmulatedExecutable(call, implementation, TARGET).run(z, np.zeros(4, np.float32))
    np.testing.assert_allclose(a.astype(np.float32), np.exp(z), rtol=2**-8)


def test_tir_bound_to_other_threads_than_the_launch_is_refused() -> None:
    with pytest.raises(LlmcError, match="bound to 64 threads, its launch says 128"):
        cuda.kernel_source(exponential_kernel(128), TARGET)

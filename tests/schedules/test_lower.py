"""Object code: what it defines, what it needs, which instructions it may use."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc import schedules
from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.target import LEVELS, Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import lower
from llmc.schedules.execute import Executable


def scale_rows(n_local: int, overrun: int = 0) -> Any:
    """y[unit, :] = 2 x[unit, :] by way of a local buffer, for 8 units of n_local elements."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("scale")
        x = T.arg("x", T.buffer((8, n_local), "float32"))
        y = T.arg("y", T.buffer((8, n_local), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        local = T.alloc_buffer((n_local,), "float32")
        with T.serial(T.truncdiv(8 * task, n_tasks), T.truncdiv(8 * (task + 1), n_tasks)) as unit:
            with T.serial(n_local) as i:
                T.buffer_store(local, x[unit, i] * T.float32(2), [i])
            with T.serial(n_local) as i:
                T.buffer_store(y, local[n_local - 1 - i], [unit, n_local - 1 - i + overrun])
    return builder.get()


def scale_kernel(name: str = "scale", n_local: int = 16, overrun: int = 0) -> Kernel:
    return Kernel(name, f"scale {n_local} {overrun}", partial(scale_rows, n_local, overrun))


def exp_kernel() -> Any:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("exponential")
        x = T.arg("x", T.buffer((1,), "float32"))
        T.arg("task", T.int32())
        T.arg("n_tasks", T.int32())
        T.buffer_store(x, T.exp(x[0]), [0])
    return builder.get()


@pytest.mark.parametrize("level", LEVELS)
def test_an_object_defines_its_kernel_and_needs_nothing(level: str) -> None:
    code = lower.compile_kernel(scale_kernel("double_rows"), Target("cpu", level))
    assert code.startswith(b"\x7fELF")
    assert b"\0double_rows\0" in code
    assert lower.foreign_symbols(code) == set()


def test_libm_may_be_called(host: Target) -> None:
    code = lower.compile_kernel(Kernel("exponential", "exponential", exp_kernel), host)
    assert b"\0expf\0" in code


def test_no_temporary_file_is_needed(host: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full LLVM would end the process."""
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    assert lower.compile_kernel(scale_kernel(), host).startswith(b"\x7fELF")


def test_a_local_buffer_that_would_come_from_the_heap_is_refused(host: Target) -> None:
    with pytest.raises(LlmcError, match="TVMBackendAllocWorkspace") as caught:
        lower.compile_kernel(scale_kernel("large", n_local=512), host)
    assert caught.value.place == "kernel large"
    assert "scratch" in str(caught.value.hint)


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.parametrize(
    ("level", "registers", "dots"),
    [
        ("x86-64-v3", "ymm", "vfmadd"),
        ("x86-64-v4", "zmm", "vfmadd"),
        ("x86-64-v4+bf16", "zmm", "vdpbf16ps"),
        ("x86-64-v4+amx", "zmm", "tdpbf16ps"),
    ],
)
def test_each_level_uses_the_instructions_it_has_and_no_others(
    tmp_path: Path, level: str, registers: str, dots: str
) -> None:
    target = Target("cpu", level)
    inputs = (TensorType((4, 64), "f32"), TensorType((64, 64), "bf16", constant=True))
    call = Call("llmc.LinearSilu", inputs, (TensorType((4, 64), "f32"),))
    path = tmp_path / "product.o"
    path.write_bytes(lower.compile_kernel(schedules.implement(call, target).launches[-1].kernel, target))
    text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert registers in text
    assert ("zmm" in text) == (registers == "zmm")
    assert dots in text
    assert ("vdpbf16ps" in text) == (dots == "vdpbf16ps")
    assert text.count("ldtilecfg") == text.count("tilerelease") == (dots == "tdpbf16ps")
    assert not re.search(r"\bcall", text)


def test_tasks_share_the_units_of_a_kernel(host: Target) -> None:
    rows = TensorType((8, 16), "f32")
    launch = Launch(scale_kernel(), (Operand("input", 0), Operand("output", 0)), grid=8)
    executable = Executable(Call("Scale", (rows,), (rows,)), Implementation((launch,)), host)
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    for n_tasks in (1, 3, 8, 20):
        (y,) = executable.run(x, n_tasks=n_tasks)
        np.testing.assert_array_equal(y, 2 * x)


def test_a_kernel_that_writes_past_a_buffer_is_caught(host: Target) -> None:
    rows = TensorType((8, 16), "f32")
    launch = Launch(scale_kernel("overrun", overrun=1), (Operand("input", 0), Operand("output", 0)), grid=8)
    executable = Executable(Call("Scale", (rows,), (rows,)), Implementation((launch,)), host)
    with pytest.raises(LlmcError, match="wrote past the end"):
        executable.run(np.zeros((8, 16), np.float32))

"""Compiled kernels on disk: found again, never trusted, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache

TARGET = Target("cpu", "x86-64-v3")


def build_copy(n: int) -> Any:
    """y = x for n elements, and a local array of n elements that makes large ones impossible."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("copy")
        x, y = T.arg("x", T.buffer((n,), "float32")), T.arg("y", T.buffer((n,), "float32"))
        T.arg("task", T.int32())
        T.arg("n_tasks", T.int32())
        local = T.alloc_buffer((n,), "float32")
        with T.serial(n) as i:
            T.buffer_store(local, x[i], [i])
        with T.serial(n) as i:
            T.buffer_store(y, local[n - 1 - i], [n - 1 - i])
    return builder.get()


def never() -> Any:
    raise AssertionError("compiled, though the cache holds it")


def copy_kernel(n: int) -> Kernel:
    return Kernel(f"copy_{n}", f"copy {n}", partial(build_copy, n))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def entry(folder: Path) -> Path:
    """The file of the one kernel in the cache: copy_4."""
    cache.compile_kernels([copy_kernel(4)], TARGET)
    (path,) = folder.iterdir()
    return path


def test_a_kernel_is_compiled_once(entry: Path) -> None:
    (code,) = cache.compile_kernels([Kernel("copy_4", "copy 4", never)], TARGET)
    assert code.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (Kernel("copy_5", "copy 4", never), TARGET),
        (Kernel("copy_4", "copy 5", never), TARGET),
        (Kernel("copy_4", "copy 4", never), Target("cpu", "x86-64-v4")),
    ],
    ids=["name", "key", "target"],
)
def test_whatever_the_code_depends_on_is_in_the_key(entry: Path, kernel: Kernel, target: Target) -> None:
    with pytest.raises(AssertionError, match="compiled"):
        cache.compile_kernels([kernel], target)


def test_an_entry_for_another_key_is_not_taken(entry: Path) -> None:
    other = copy_kernel(5)
    entry.rename(cache._path(cache.key_text(other, TARGET)))
    assert cache.load(other, TARGET) is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "head"])
def test_a_damaged_entry_is_compiled_again(entry: Path, damage: str) -> None:
    whole = entry.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    entry.write_bytes({"empty": b"", "truncated": whole[:-7], "flipped": flipped, "head": whole[:20]}[damage])
    cache.compile_kernels([copy_kernel(4)], TARGET)
    assert entry.read_bytes() == whole


def test_a_folder_that_cannot_be_written_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file" / "kernels"))
    (code,) = cache.compile_kernels([copy_kernel(4)], TARGET)
    assert code.startswith(b"\x7fELF")


def test_a_full_disk_leaves_no_partial_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(source: Any, place: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_room)
    (code,) = cache.compile_kernels([copy_kernel(4)], TARGET)
    assert code.startswith(b"\x7fELF")
    assert list(folder.iterdir()) == []


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/llmc/kernels")
    monkeypatch.setenv("LLMC_CACHE", "/elsewhere")
    assert cache.folder() == Path("/elsewhere")


def test_objects_come_in_the_order_of_the_kernels_with_progress(folder: Path) -> None:
    kernels = [copy_kernel(n) for n in (6, 4, 5)]
    cache.compile_kernels(kernels[:1], TARGET)
    seen: list[tuple[int, int]] = []
    objects = cache.compile_kernels(kernels, TARGET, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for kernel, code in zip(kernels, objects, strict=True):
        assert f"\0{kernel.name}\0".encode() in code


CHOOSE_AND_COMPILE = """
from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target
from llmc.schedules import cache

target = Target("cpu", "x86-64-v3")
inputs = TensorType((2, 16), "f32"), TensorType((16, 16), "bf16", constant=True)
implementation = schedules.implement(Call("llmc.Linear", inputs, (inputs[0],)), target)
cache.compile_kernels([launch.kernel for launch in implementation.launches], target)
"""


def test_with_a_warm_cache_tvm_is_not_imported(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for script in (CHOOSE_AND_COMPILE, "import sys; sys.modules['tvm'] = None\n" + CHOOSE_AND_COMPILE):
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.fixture
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KERNELS_PER_WORKER", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def pack_kernel(k: int) -> Kernel:
    """A kernel that another process can build: its builder is in an installed module."""
    from llmc.schedules.cpu.linear import rule as linear

    return linear.packing_kernel(linear.Linear(2, 0, k, "f32", "fma"), linear.Tiles(2, 1, k))


def test_processes_share_the_work(folder: Path, many_workers: None) -> None:
    kernels = [pack_kernel(k) for k in (16, 17, 18, 32)]
    kernels.append(Kernel("copy_4", "copy 4", lambda: build_copy(4)))  # which cannot be sent to another process
    objects = cache.compile_kernels(kernels, TARGET)
    assert [f"\0{kernel.name}\0".encode() in code for kernel, code in zip(kernels, objects, strict=True)] == [True] * 5
    assert len(list(folder.iterdir())) == 5


def test_a_failure_in_another_process_is_raised_here(folder: Path, many_workers: None) -> None:
    from llmc.schedules.cpu.linear import rule as linear

    broken = partial(linear.build_packing, linear.Linear(2, 0, 16, "f32", "fma"), 0)
    kernels = [pack_kernel(16), Kernel("broken", "broken", broken)]
    with pytest.raises((RuntimeError, LlmcError), match="broken"):
        cache.compile_kernels(kernels, TARGET)


def test_a_relative_folder_is_the_same_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMC_CACHE", "kernels")
    assert cache.folder() == tmp_path / "kernels"


def test_ctrl_c_does_not_reach_a_compiling_process() -> None:
    """It would print where it was."""
    worker = cache._Worker([], TARGET)
    try:
        assert os.getsid(worker._process.pid) != os.getsid(0)
    finally:
        worker.stop()

"""Run an implementation on NumPy arrays in this process: what tests check kernels with, and the tuner times.

(y,) = Executable(call, implement(call, target), target).run(x, w, n_tasks=3)
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.bind import IN_PLACE
from llmc.compiler.kernel import Call, Implementation, Operand, RowMajor, numpy_dtype
from llmc.compiler.target import Target, tiles_allowed
from llmc.runtime.errors import LlmcError
from llmc.schedules import cache

Array = np.ndarray[Any, Any]

GUARD_BYTES = 256
"""Each buffer is followed by so many bytes, which a kernel must not change."""

_POISON = 0xFF
"""What fresh memory is filled with: NaN, whether read as f32 or bf16."""


class Executable:
    """A call's implementation, compiled and loaded."""

    def __init__(self, call: Call, implementation: Implementation, target: Target) -> None:
        self.call = call
        self.implementation = implementation
        if target.has("amx_tile"):
            tiles_allowed()
        kernels = {launch.kernel.name: launch.kernel for launch in implementation.launches}
        objects = cache.compile_kernels(list(kernels.values()), target)
        library = load_objects(objects)
        self.functions = {name: getattr(library, name) for name in kernels}

    def prepare(
        self, *inputs: Array | None, n_tasks: int = 1, kv: Array | None = None, state: Array | None = None
    ) -> Prepared:
        """Memory for one execution: constants packed, outputs and temporaries poisoned.  See `run`."""
        return Prepared(self, inputs, n_tasks, {"kv": kv, "state": state})

    def run(
        self, *inputs: Array | None, n_tasks: int = 1, kv: Array | None = None, state: Array | None = None
    ) -> list[Array]:
        """The call's outputs for these inputs.

        inputs: as the call's, in order; constants as they would come from a checkpoint.
        n_tasks: into how many tasks each launch is cut (at most its grid).
        kv, state: the memory of the KV cache, or of all slots' states (any dtype, written in place), when the call
        keeps one.
        Raises LlmcError when a kernel fails or writes outside of its buffers.
        """
        prepared = self.prepare(*inputs, n_tasks=n_tasks, kv=kv, state=state)
        prepared.run()
        prepared.check_guards()
        return [prepared.outputs[index] for index in range(len(self.call.outputs))]


class Prepared:
    """An executable with memory for its operands.  `run` may be called again and again."""

    def __init__(
        self,
        executable: Executable,
        inputs: Sequence[Array | None],
        n_tasks: int,
        kept: Mapping[str, Array | None],
    ) -> None:
        """kept: memory that outlives a step (KV cache, states), by the kind of its operand."""
        call, implementation = executable.call, executable.implementation
        self._buffers: list[Array] = []
        self.inputs = {
            index: self._input(array, executable, index) for index, array in enumerate(inputs) if array is not None
        }
        self.outputs = {
            index: self._fresh(output.n_bytes).view(numpy_dtype(output.dtype)).reshape(output.shape)
            for index, output in enumerate(call.outputs)
        }
        self._in_place = IN_PLACE.get(call.op.removeprefix("llmc."))
        self._temps = [self._fresh(n_bytes) for n_bytes in implementation.temps]
        self._scratch = [self._fresh(implementation.scratch_bytes) for _ in range(n_tasks)]
        self._kept = kept
        self._steps: list[list[Callable[[], int]]] = []
        for launch in implementation.launches:
            tasks = min(n_tasks, launch.grid)
            function = executable.functions[launch.kernel.name]
            step = []
            for task in range(tasks):
                pointers = [ctypes.c_void_p(self._memory(operand, task).ctypes.data) for operand in launch.operands]
                step.append(_bound(function, [*pointers, ctypes.c_int32(task), ctypes.c_int32(tasks)]))
            self._steps.append(step)
        self._names = [launch.kernel.name for launch in implementation.launches]

    def run(self, in_parallel: Callable[[list[Callable[[], int]]], Sequence[int]] | None = None) -> None:
        """Every launch in order, its tasks last to first, or as `in_parallel` runs the tasks it is given."""
        if self._in_place is not None:
            self.outputs[0].reshape(-1).view(np.uint8)[:] = self.inputs[self._in_place]
        for name, tasks in zip(self._names, self._steps, strict=True):
            statuses = in_parallel(tasks) if in_parallel else [task() for task in reversed(tasks)]
            if any(statuses):
                raise LlmcError(f"the kernel returned {next(filter(None, statuses))}", place=f"kernel {name}")

    def check_guards(self) -> None:
        """Raises LlmcError if a kernel wrote past the end of a buffer."""
        if any((buffer[-GUARD_BYTES:] != _POISON).any() for buffer in self._buffers):
            raise LlmcError("a kernel wrote past the end of a buffer", place=", ".join(self._names))

    def _memory(self, operand: Operand, task: int) -> Array:
        if operand.kind in self._kept:
            memory = self._kept[operand.kind]
            assert memory is not None, f"this call keeps something: pass {operand.kind}"
            return memory
        places: dict[str, Any] = {"input": self.inputs, "output": self.outputs, "temp": self._temps}
        found: Array = self._scratch[task] if operand.kind == "scratch" else places[operand.kind][operand.index]
        return found

    def _input(self, array: Array, executable: Executable, index: int) -> Array:
        kind = executable.call.inputs[index]
        if kind is None or array.shape != kind.shape:
            raise ValueError(f"input {index} is {array.shape}, the call says {kind}")
        if kind.constant:
            array = executable.implementation.layouts.get(index, RowMajor(kind.dtype)).pack(array)
        else:
            array = np.ascontiguousarray(array, numpy_dtype(kind.dtype))
        memory = self._fresh(array.nbytes)
        memory[:] = array.reshape(-1).view(np.uint8)
        return memory

    def _fresh(self, n_bytes: int) -> Array:
        """Poisoned memory, 64-byte aligned, with a guard after it."""
        raw = np.full(n_bytes + GUARD_BYTES + 64, _POISON, np.uint8)
        start = -raw.ctypes.data % 64
        buffer = raw[start : start + n_bytes + GUARD_BYTES]
        self._buffers.append(buffer)
        return buffer[:n_bytes]


def load_objects(objects: Sequence[bytes]) -> ctypes.CDLL:
    """Object files as a shared library in this process."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        paths = []
        for index, code in enumerate(objects):
            paths.append(path := Path(folder, f"{index}.o"))
            path.write_bytes(code)
        library = Path(folder, "kernels.so")
        command = [*_linker(), "-shared", "-o", str(library), *map(str, paths), "-lm"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise LlmcError(f"linking kernels failed: {answer.stderr.strip()}", place=command[0])
        return ctypes.CDLL(str(library))


def _linker() -> list[str]:
    """The machine's C compiler, or ziglang's."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"]


def _bound(function: Any, arguments: list[Any]) -> Callable[[], int]:
    return lambda: int(function(*arguments))

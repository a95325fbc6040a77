"""Run a GPU implementation on NumPy arrays, on the CPU: what tests check GPU kernels with.

    (y,) = EmulatedExecutable(call, implement(call, target), target).run(x, w)

The interface is that of schedules/execute.py.  Memory is poisoned with NaN, each buffer ends where a page begins that
nobody may touch, and everything runs twice, with blocks and threads in opposite orders: the results must be the same.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.bind import IN_PLACE
from llmc.compiler.kernel import Call, Implementation, Launch, Operand, RowMajor, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from tests.emulator.build import build_library

Array = np.ndarray[Any, Any]

ALIGNMENT = 64
"""Of a buffer's start, in bytes."""
PAGE = mmap.PAGESIZE
POISON = 0xFF
ERROR_BYTES = 2000

FORWARD, BACKWARD = 0, 1
"""Orders of blocks, and of threads within them."""


class EmulatedExecutable:
    """A call's implementation for a GPU, compiled for this CPU.

    checked: report races, and accesses outside of the operands.
    """

    def __init__(self, call: Call, implementation: Implementation, target: Target, *, checked: bool = True) -> None:
        self.call = call
        self.implementation = implementation
        kernels = [launch.kernel for launch in implementation.launches]
        # Ids and positions, and the cache and states of earlier steps, are there before the step's first launch.
        fixed = [i for i, kind in enumerate(call.inputs) if kind and (kind.constant or kind.dtype in ("i32", "i64"))]
        self._early = {"kv", "state", *(f"input {index}" for index in fixed)}
        self._library = load_library(build_library(kernels, target, checked=checked))

    def run(
        self, *inputs: Array | None, kv: Array | None = None, state: Array | None = None, n_tasks: int = 1
    ) -> list[Array]:
        """The call's outputs for these inputs; a tiled output as the f32 matrix it holds.

        inputs: as the call's, in order; constants as they would come from a checkpoint, a tiled input as a matrix.
        kv, state: the memory of the KV cache, or of all slots' states (any dtype, written in place), when the call
        keeps one.
        n_tasks is ignored: a GPU's blocks are what they are.
        Raises LlmcError when a kernel does what it may not, or when results depend on the order of threads.
        """
        kept = {name: array for name, array in (("kv", kv), ("state", state)) if array is not None}
        forward = self._run_once(inputs, kept, FORWARD)
        backward = self._run_once(inputs, kept, BACKWARD)
        for name, there in forward.items():
            if there.tobytes() != backward[name].tobytes():
                raise LlmcError(f"{name} depends on the order in which threads run", place=str(self.call))
        for name, array in kept.items():
            array.reshape(-1).view(np.uint8)[:] = forward[name]
        return [forward[f"output {index}"] for index in range(len(self.call.outputs))]

    def _run_once(self, inputs: Sequence[Array | None], kept: Mapping[str, Array], order: int) -> dict[str, Array]:
        """kept: what outlives a step, by the kind of its operand."""
        memory = Memory(self._contents(inputs, kept))
        for launch in self.implementation.launches:
            self._launch(launch, memory, order)
            if memory.get("scratch", np.zeros(0)).any():
                raise LlmcError("scratch memory is not left zero", place=f"kernel {launch.kernel.name}")
        results = {f"output {i}": _result(memory[f"output {i}"], kind) for i, kind in enumerate(self.call.outputs)}
        return results | {name: memory[name].copy() for name in kept}

    def _launch(self, launch: Launch, memory: Memory, order: int) -> None:
        names = [_name(operand) for operand in launch.operands]
        if missing := [name for name in names if name not in memory]:
            raise LlmcError(f"the launch takes {missing[0]}, which the call has not", place=launch.kernel.name)
        set_buffers(self._library, {name: memory[name] for name in names}, self._early)
        self._library.emulated_set_dependent(ctypes.c_int(launch.kernel.dependent))
        self._library.emulated_set_order(ctypes.c_int(order))
        run_kernel(self._library, launch.kernel.name, launch.grid, [memory[name] for name in names])

    def _contents(self, inputs: Sequence[Array | None], kept: Mapping[str, Array]) -> dict[str, Array]:
        """What lies in each buffer at the start, as bytes."""
        poisoned = functools.partial(np.full, fill_value=POISON, dtype=np.uint8)
        contents = {}
        for index, (kind, array) in enumerate(zip(self.call.inputs, inputs, strict=True)):
            if array is None:  # left out, or part of the KV cache
                continue
            if kind is None or kind.shape != array.shape:
                raise ValueError(f"input {index} is {array.shape}, the call says {kind}")
            contents[f"input {index}"] = self._packed(index, kind, array)
        for index, output in enumerate(self.call.outputs):
            contents[f"output {index}"] = poisoned(output.n_bytes)
        if (place := IN_PLACE.get(self.call.op.removeprefix("llmc."))) is not None:
            contents["output 0"] = contents[f"input {place}"].copy()
        for index, n_bytes in enumerate(self.implementation.temps):
            contents[f"temp {index}"] = poisoned(n_bytes)
        if self.implementation.scratch_bytes:
            contents["scratch"] = np.zeros(self.implementation.scratch_bytes, np.uint8)
        bytes_of = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in kept.items()}
        return contents | bytes_of

    def _packed(self, index: int, kind: TensorType, array: Array) -> Array:
        if kind.constant:
            array = self.implementation.layouts.get(index, RowMajor(kind.dtype)).pack(array)
        elif kind.tiled:
            array = tile(array, kind.dtype)
        else:
            array = np.ascontiguousarray(array, numpy_dtype(kind.dtype))
        return array.reshape(-1).view(np.uint8)


def _name(operand: Operand) -> str:
    return operand.kind if operand.kind in ("kv", "state", "scratch") else f"{operand.kind} {operand.index}"


def _result(memory: Array, kind: TensorType) -> Array:
    if kind.tiled:
        return untile(memory, kind.shape, kind.dtype)
    return memory[: kind.n_bytes].view(numpy_dtype(kind.dtype)).reshape(kind.shape).copy()


# ---- tiled matrices: compiler/kernel.py says what they are


def tile(matrix: Array, dtype: str) -> Array:
    """A matrix [M, K] as [ceil(K/64)][M rounded up to 8][64]; rows past M are NaN, columns past K zero."""
    m, k = matrix.shape
    rows, slabs = -(-m // 8) * 8, -(-k // 64)
    padded = np.zeros((rows, slabs * 64), numpy_dtype(dtype))
    padded[:m, :k] = matrix.astype(numpy_dtype(dtype))
    padded[m:] = np.nan
    chunks = padded.reshape(rows, slabs, 8, 8).swapaxes(0, 1)
    return np.ascontiguousarray(chunks[_swizzle(slabs, rows)])


def untile(memory: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """The matrix [M, K], f32.  Raises LlmcError when columns past K are not zero."""
    m, k = shape
    rows, slabs = -(-m // 8) * 8, -(-k // 64)
    tiles = memory[: slabs * rows * 128].view(numpy_dtype(dtype)).reshape(slabs, rows, 8, 8)
    matrix = tiles[_swizzle(slabs, rows)].swapaxes(0, 1).reshape(rows, slabs * 64).astype(np.float32)
    if not (matrix[:m, k:] == 0).all():
        raise LlmcError(f"columns past {k} of a tiled matrix are not zero", place=f"{dtype}{list(shape)}")
    return matrix[:m, :k]


def _swizzle(slabs: int, rows: int) -> tuple[Array, Array, Array]:
    """Where the chunks [slab, row, c] lie; the way back is the same."""
    slab, row, chunk = np.ogrid[:slabs, :rows, :8]
    return slab, row, chunk ^ (row % 8)


# ---- memory that ends at a forbidden page


class Memory(Mapping[str, Array]):
    """Buffers of bytes by name, each 64-byte aligned, ending (but for a guard of up to 63) at a forbidden page."""

    def __init__(self, contents: Mapping[str, Array]) -> None:
        spans = {name: -(-array.nbytes // PAGE) * PAGE + PAGE for name, array in contents.items()}
        self._raw = mmap.mmap(-1, sum(spans.values()) + PAGE)
        raw = np.frombuffer(self._raw, np.uint8)
        raw[:] = POISON
        self._buffers: dict[str, Array] = {}
        end = 0
        _forbid(raw, end)
        for name, array in contents.items():
            end += spans[name]
            start = end - -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            self._buffers[name] = raw[start : start + array.nbytes]
            self._buffers[name][:] = array
            _forbid(raw, end)

    def __getitem__(self, name: str) -> Array:
        return self._buffers[name]

    def __iter__(self) -> Any:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)


def _forbid(raw: Array, start: int) -> None:
    """Takes all rights to one page."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(raw.ctypes.data + start), ctypes.c_size_t(PAGE), ctypes.c_int(0)):
        raise OSError(ctypes.get_errno(), "mprotect")


# ---- libraries


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_void_p),
        ("n_bytes", ctypes.c_size_t),
        ("guard_bytes", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
    )


@functools.cache
def load_library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def set_buffers(library: ctypes.CDLL, buffers: Mapping[str, Array], early: Collection[str] = ()) -> None:
    """The memory that kernels of the library may touch from now on; early: what they may read before they wait."""
    records = (_Buffer * len(buffers))(
        *(
            _Buffer(array.ctypes.data, array.nbytes, -array.nbytes % ALIGNMENT, name.encode())
            for name, array in buffers.items()
        )
    )
    library.emulated_set_buffers(records, ctypes.c_int(len(buffers)))
    for index, name in enumerate(buffers):
        if name in early:
            library.emulated_mark_constant(ctypes.c_int(index))


def run_kernel(library: ctypes.CDLL, name: str, grid: int, operands: Iterable[Array]) -> None:
    """One launch.  Raises LlmcError with what the emulator has to say."""
    pointers = [array.ctypes.data for array in operands]
    error = ctypes.create_string_buffer(ERROR_BYTES)
    arguments = (ctypes.c_void_p * len(pointers))(*pointers)
    if getattr(library, f"emulate_{name}")(ctypes.c_int(grid), arguments, error, ctypes.c_size_t(ERROR_BYTES)):
        raise LlmcError(error.value.decode(), place="emulator")

"""What the planner and the schedules say to each other.

The planner asks with a `Call` (one graph node, every shape bound) and a `Target`; a schedule answers with an
`Implementation`: which kernels to launch on which operands, and how the constants must lie in the artifact.
A kernel is a C function `int32_t name(void *operand…, int32_t task, int32_t n_tasks)`. The runtime calls it once
for each task 0 <= task < n_tasks <= grid, on any thread and in any order, and puts a barrier between launches; a task
does its share of the kernel's `grid` units of work: `grid * task // n_tasks` up to `grid * (task + 1) // n_tasks`.

On a GPU a kernel is a `__global__` function of device pointers and `grid` the number of its thread blocks; a launch
sees what the launches before it wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, Protocol

import numpy as np

DType = Literal["f32", "bf16", "f16", "i32", "i64", "i8", "u8", "i4", "z4", "f8", "m4", "bool"]
"""f8 is e4m3fn, m4 is e2m1; z4 is i4 with a zero for each group."""
DTYPE_BYTES: Mapping[str, int] = {
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "i32": 4,
    "i64": 8,
    "i8": 1,
    "u8": 1,
    "f8": 1,
    "bool": 1,
}

PAGE_TOKENS = 64
"""Tokens in one page of the KV cache."""

FEW_ROWS = 64
"""A step of more rows (a prompt) is bound by arithmetic on a GPU, and its attention is two launches."""

QUERY_ROWS = 128
"""Rows of queries that attention of a prompt reads together, in tiles of PAGE_TOKENS rows."""

TILE_ROWS, TILE_COLUMNS = 8, 64
"""A tiled matrix [M, K] of 2-byte elements is [ceil(K/64)][M rounded up to 8][64]: slabs of 64 columns, in which the
16-byte chunk c of row m lies at chunk c ^ (m % 8).  This is how Hopper's shared memory wants it ("128-byte swizzle"),
so that one plain copy brings a tile.  Rows past M hold anything, columns past K zeros."""

STRIP = 8
"""Columns of a gate that stand side by side where gate and up alternate, as rows of a GPU's gated weight do."""

PART_COLUMNS = 16
"""A product in front of a deferred norm hands on the moments of so many columns together (ops/deferred_norm.py)."""


@dataclass(frozen=True)
class TensorType:
    """Shape, element type, and whether the value is known at compile time (a weight or a table).

    group: of a quantised weight (i8, i4, z4, f8, m4), how many elements of a row share a scale; 0 is all of them.
    tiled: a matrix [M, K] on a GPU that lies in the order of shared memory's tiles, see TILE_ROWS.
    """

    shape: tuple[int, ...]
    dtype: DType
    constant: bool = False
    group: int = 0
    tiled: bool = False

    @property
    def n_bytes(self) -> int:
        shape = self.shape
        if self.tiled:
            n_rows, n_columns = shape
            shape = (-(-n_columns // TILE_COLUMNS), -(-n_rows // TILE_ROWS) * TILE_ROWS, TILE_COLUMNS)
        return prod(shape) * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else ""
        shape = ",".join(map(str, self.shape))
        return f"{self.dtype}{group}[{shape}]{'!' if self.constant else ''}{' tiled' if self.tiled else ''}"


@dataclass(frozen=True)
class Call:
    """One node of the step graph for one M.  `op` is "domain.Name" for our operators, "Name" for standard ones.

    Activations are f32 and row-major; token ids, positions and page tables are i32; a constant carries the dtype it
    is stored in.  An input left out is None.  `attributes` are sorted by name.
    """

    op: str
    inputs: tuple[TensorType | None, ...]
    outputs: tuple[TensorType, ...]
    attributes: tuple[tuple[str, Any], ...] = ()

    def attribute(self, name: str, default: Any = None) -> Any:
        return dict(self.attributes).get(name, default)

    def __str__(self) -> str:
        attributes = "".join(f", {name}={value}" for name, value in self.attributes)
        results = ", ".join(map(str, self.outputs))
        return f"{self.op}({', '.join(map(str, self.inputs))}{attributes}) -> {results}"


class Layout(Protocol):
    """How a constant lies in the artifact.  Equal layouts compare equal; `str()` is what `llmc inspect` prints."""

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a constant of this shape takes."""

    def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The constant (in its stored dtype: float32, float16, ml_dtypes.bfloat16), contiguous in this layout."""


@dataclass(frozen=True)
class Operand:
    """One pointer of a launch: an input or output of the call, a temporary of the implementation, the layer's part
    of the KV cache (its first page's), the node's part of a state (that of the first slot), or the thread's own scratch
    memory."""

    kind: Literal["input", "output", "temp", "kv", "state", "scratch"]
    index: int = 0


@dataclass(frozen=True)
class Kernel:
    """A function to compile.  `build` gives the TIR PrimFunc whose parameters are one flat-strided buffer an operand,
    then `task: int32, n_tasks: int32`.  `key` says everything that `build` depends on: equal keys, equal code.

    On a GPU `build` gives CUDA C++ (a string) that defines `extern "C" __global__ void name(pointer…)`, or a PrimFunc
    with bound blocks and threads.  n_threads: of a block.  shared_bytes: dynamic shared memory of a block.  dependent:
    it may start before the kernel in front of it has ended, and itself waits for that where it must.
    """

    name: str
    key: str
    build: Callable[[], Any] = field(compare=False, repr=False)
    n_threads: int = 0
    shared_bytes: int = 0
    dependent: bool = False


def short_hash(key: str) -> str:
    """What a kernel's name ends with: eight hex digits of its key's SHA-256, so that variants of it can coexist."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Launch:
    """One kernel over operands.  `grid` is the number of independent units of work: 1 runs on one thread.
    `n_bytes` and `n_operations` are what it must read and write, and compute: the roofline's view of it."""

    kernel: Kernel
    operands: tuple[Operand, ...]
    grid: int = 1
    n_bytes: int = 0
    n_operations: int = 0


@dataclass(frozen=True)
class Implementation:
    """How a call is executed: launches in order, with a barrier after each.

    temps: bytes of each temporary, alive during this call only, 64-byte aligned.
    scratch_bytes: memory each thread needs for itself.  On a GPU: memory all kernels share that is zero when a launch
    begins and when it ends, for counters.
    layouts: for each constant input (by index) the layout it must be packed in; RowMajor when absent.
    kv_layer_bytes: bytes one page takes for this layer, when the call keeps a KV cache.
    rule: the name of the schedule that answered; params: its tuning parameters, as text; family: what people call a
    kernel of this kind ("GEMV"), where there are several.
    op: the operator that is executed, where that is another than the call's; else empty.
    measured: what `llmc tune` found when the parameters are its choice (a record of schedules/records.py); empty when
    they are the rule's own.
    """

    launches: tuple[Launch, ...]
    temps: tuple[int, ...] = ()
    scratch_bytes: int = 0
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    kv_layer_bytes: int = 0
    rule: str = ""
    params: str = ""
    family: str = ""
    op: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowMajor:
    """A constant as NumPy lays it out, in its stored dtype or cast to `dtype`."""

    dtype: DType

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * DTYPE_BYTES[self.dtype]

    def pack(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.ascontiguousarray(array, dtype=numpy_dtype(self.dtype))

    def __str__(self) -> str:
        return f"{self.dtype} row-major"


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of an element type; bf16 is ml_dtypes.bfloat16, f8 ml_dtypes.float8_e4m3fn."""
    if dtype in ("bf16", "f8"):
        import ml_dtypes

        own: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else ml_dtypes.float8_e4m3fn)
        return own
    names = {"f32": "float32", "f16": "float16", "i32": "int32", "i64": "int64", "i8": "int8", "u8": "uint8"}
    return np.dtype(names.get(dtype, dtype))

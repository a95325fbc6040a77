"""A model's weights, unread until they are packed.

A `Weight` is the `const_value` of a graph initializer. To the graph it is a float32 tensor; it is *stored* in its own
dtype (f32, f16 or bf16), and a pass that rearranges weights makes a new `Weight` that rearranges them when it is read.
Nothing is kept after a read: a 7B model goes through the pipeline one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from llmc.compiler.fold_norm import fold_norm
from llmc.compiler.kernel import DTYPE_BYTES, numpy_dtype
from llmc.runtime.errors import LlmcError

StoredDType: TypeAlias = Literal["f32", "f16", "bf16", "i8", "i4", "z4", "f8", "m4"]
"""i8, i4, z4, f8 and m4: codes with scales, see quantization/quantize.py."""
STORED_DTYPES: tuple[StoredDType, ...] = ("f32", "f16", "bf16")
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coded:
    """How a checkpoint keeps a weight's values.

    bits: of a code, the most where parts differ.  group: columns side by side that share a scale; 0: they are not side
    by side.  zeros: whether a group has a zero, or a minimum, besides.
    """

    bits: int
    group: int = 0
    zeros: bool = False

    def has_zeros_of(self, group: int) -> bool:
        """Whether its codes are of 4 bits, with a zero and a scale for this many columns, or for a multiple of it."""
        return self.zeros and self.bits <= 4 and self.group > 0 and self.group % group == 0


def coded_of(parts: Sequence[Weight]) -> Coded | None:
    """How a checkpoint keeps these; those that are no codes do not count."""
    found = [part.coded for part in parts if part.coded is not None]
    if not found:
        return None
    zeros = any(coded.zeros for coded in found)
    return Coded(max(coded.bits for coded in found), gcd(*(coded.group for coded in found)), zeros)


class Weight(ir.LazyTensor):
    """A lazily read constant of the graph.

    name: what the checkpoint calls it, or what a pass named it.  dims: its shape in plain ints.
    stored_dtype: how the artifact keeps it.  made_of: what a pass made it of, and how; () for a checkpoint's own.
    coded: how the checkpoint keeps its values, if it does so in few bits.  sources: the names of the checkpoint's that
    its values come from.
    `read()` gives the values, of this shape, as float32, float16 or bfloat16; they are cast to the stored dtype.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        read: Callable[[], Array],
        stored_dtype: StoredDType = "f32",
        coded: Coded | None = None,
    ) -> None:
        self.dims = tuple(int(size) for size in shape)
        self.stored_dtype: StoredDType = stored_dtype
        self._read = read
        self.coded = coded
        self.made_of: tuple[object, ...] = ()
        self.sources = frozenset([name])
        graph_shape = ir.Shape(self.dims, frozen=True)
        super().__init__(lambda: ir.tensor(self.numpy()), ir.DataType.FLOAT, graph_shape, name=name)

    @classmethod
    def of_array(cls, name: str, array: Array, stored_dtype: StoredDType | None = None) -> Weight:
        """A weight that is in memory already; stored as it is unless told otherwise."""
        return cls(name, array.shape, lambda: array, stored_dtype or dtype_of(array))

    @classmethod
    def computed(
        cls,
        name: str,
        shape: Sequence[int],
        read: Callable[[], Array],
        stored_dtype: StoredDType = "f32",
        made_of: tuple[object, ...] = (),
        coded: Coded | None = None,
    ) -> Weight:
        """A weight that `read` works out, from other weights or from nothing (a table)."""
        weight = cls(name, shape, read, stored_dtype, coded)
        weight.made_of = made_of
        if parts := [part for part in made_of if isinstance(part, Weight)]:
            weight.sources = frozenset().union(*(part.sources for part in parts))
        return weight

    @classmethod
    def concat(cls, parts: Sequence[Weight], axis: int = 0, name: str | None = None) -> Weight:
        """The parts one after the other along `axis`; stored as they are, or in f32 where they differ."""
        shape = list(parts[0].dims)
        shape[axis] = sum(part.dims[axis] for part in parts)
        stored = {part.stored_dtype for part in parts}
        return cls.computed(
            name or "+".join(part.name or "" for part in parts),
            shape,
            lambda: np.concatenate(_alike(parts), axis),
            stored.pop() if len(stored) == 1 else "f32",
            ("concat", axis, *parts),
            coded_of(parts),
        )

    def slice(self, start: int, stop: int, axis: int = 0, name: str | None = None) -> Weight:
        """Entries `start` up to `stop` along `axis`."""
        shape = list(self.dims)
        shape[axis] = stop - start
        index = (slice(None),) * axis + (slice(start, stop),)
        name = name or f"{self.name}[{start}:{stop}]"
        part = Weight(name, shape, lambda: self.unrounded()[index], self.stored_dtype, self.coded)
        part.sources = self.sources
        return part

    def stored_as(self, dtype: StoredDType) -> Weight:
        """The same values, stored in another dtype."""
        same = Weight(self.name or "", self.dims, self._read, dtype, self.coded)
        same.sources = self.sources
        return same

    @property
    def stored_bytes(self) -> int:
        """Bytes of the values in their stored dtype."""
        return prod(self.dims) * DTYPE_BYTES[self.stored_dtype]

    def unrounded(self) -> Array:
        """The values, read now, as the checkpoint has them: before they are rounded to the stored dtype.  Weights that
        are to be quantised are read so, and what is made of a weight by moving elements.  Do not write to it."""
        array = self._read()
        if array.shape != self.dims:
            raise ValueError(f"{self.name}: read gave shape {array.shape}, not {self.dims}")
        return array

    def stored(self) -> Array:
        """The values, read now, in the stored dtype (float32, float16 or ml_dtypes.bfloat16).  Do not write to it."""
        return self.unrounded().astype(numpy_dtype(self.stored_dtype), copy=False)

    def numpy(self) -> Array:
        """The stored values widened to float32."""
        return self.stored().astype(np.float32, copy=False)

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, {list(self.dims)}, {self.stored_dtype})"


def _alike(parts: Sequence[Weight]) -> list[Array]:
    """The parts' values in one dtype: as they are read where all are stored alike, float32 if they are read
    differently."""
    is_alike = len({part.stored_dtype for part in parts}) == 1
    arrays = [part.unrounded() if is_alike else part.stored() for part in parts]
    is_one = len({array.dtype for array in arrays}) == 1
    return arrays if is_one else [array.astype(np.float32, copy=False) for array in arrays]


class FoldedNorm(Weight):
    """[W g; W b + bias], f32 [2, rows of W]: see fold_norm.py.  Worked out from the values that W stands for as it is
    stored, whenever it is read: a weight that is quantised then is quantised once more."""

    def __init__(self, weight: Weight, norm_weight: Weight, norm_bias: Weight, bias: Weight | None = None) -> None:
        self.parts = (weight, norm_weight, norm_bias, bias)
        super().__init__(f"{weight.name}.folded", (2, weight.dims[0]), self._fold)

    def _fold(self) -> Array:
        weight, norm_weight, norm_bias, bias = self.parts
        vectors = (norm_weight.stored(), norm_bias.stored(), None if bias is None else bias.stored())
        return fold_norm(weight.stored(), *vectors)


def dtype_of(array: Array) -> StoredDType:
    """The stored dtype that holds this array as it is."""
    for dtype in STORED_DTYPES:
        if array.dtype == numpy_dtype(dtype):
            return dtype
    raise ValueError(f"a weight of {array.dtype}")


def choose_dtype(checkpoint: StoredDType, asked: str | None, has_f16: bool = False) -> tuple[StoredDType, str | None]:
    """The dtype the artifact stores weights in, and what to tell the user about it.

    By default the checkpoint's own. has_f16: whether the target has kernels for float16; CPUs have none. There such a
    checkpoint is stored as bfloat16 (same size, same range or more, three bits of precision fewer) and the user is
    told, unless he asks for another dtype.
    """
    if not has_f16 and asked == "f16":
        raise LlmcError("float16 weights are not supported on CPU", place="--dtype f16", hint="use --dtype bf16")
    if not has_f16 and asked is None and checkpoint == "f16":
        return "bf16", "the checkpoint's float16 weights are stored as bfloat16; --dtype f32 keeps every bit"
    for dtype in STORED_DTYPES:
        if dtype == (asked or checkpoint):
            return dtype, None
    raise LlmcError(f"unknown dtype {asked!r}", place="--dtype", hint=f"one of f32, bf16{', f16' * has_f16}")

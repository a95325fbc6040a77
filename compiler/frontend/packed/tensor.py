"""A weight that a checkpoint keeps in several tensors, as codes and what makes numbers of them; read as those numbers.

    number[n, k] = (code[n, k] - zero[n / R, group of k]) * scale[n / R, group of k]

That is worked out in float32, in which it is exact but for scales that are float32 themselves, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from llmc.compiler.frontend.checkpoint import DTYPES, StoredTensor
from llmc.compiler.weights import Array, Coded, StoredDType
from llmc.runtime.errors import LlmcError

Checkpoint: TypeAlias = Mapping[str, StoredTensor]
Parts: TypeAlias = Mapping[str, StoredTensor]
"""The tensors of one weight, by what they are."""

FLOATS = (*DTYPES,)
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """The weight that its parts stand for.

    dims are its own, dtype is the method's name, file, offset and n_bytes are those of the codes.
    of: its parts, codes first.  values: reads and multiplies them.  stored: the dtype that the numbers are made for.
    coded: how its values are kept, where a scheme of ours may ask.
    """

    of: tuple[StoredTensor, ...]
    values: Callable[[], Array] = field(compare=False)
    stored: StoredDType
    coded: Coded | None = None

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.of

    @property
    def stored_dtype(self) -> StoredDType:
        return self.stored

    def read(self) -> Array:
        """The values, float32 or bfloat16 [N, K]: `stored` says what they are to be rounded to."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for who reads it
            return self.values()


@dataclass(frozen=True)
class Names:
    """How the names of a weight's parts end, by what they are.

    whole: how the weight's own name ends.  unused: what else lies beside them and says nothing about the weight.
    marks: the ends that say that there is a weight; all that are required, but for the whole's, when ().
    """

    whole: str
    required: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


def join(checkpoint: Checkpoint, names: Names, weight: Callable[[str, Parts], StoredTensor]) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each weight's parts.  Reads no tensor.

    weight: makes it, of its name and its parts.  A weight of which a part is missing is refused by the part's name.
    """
    tensors = dict(checkpoint)
    marks = names.marks or [end for end in names.required.values() if end != names.whole]
    stems = {name.removesuffix(end): name for end in marks for name in checkpoint if name.endswith(end)}
    for stem, found in stems.items():
        parts = {}
        for part, end in {**names.required, **names.optional}.items():
            tensor = tensors.pop(f"{stem}{end}", None)
            if tensor is not None:
                parts[part] = tensor
            elif part in names.required:
                fact = f"the checkpoint lacks the tensor {f'{stem}{end}'!r}"
                raise LlmcError(fact, place=str(checkpoint[found].file))
        for end in names.unused:
            tensors.pop(f"{stem}{end}", None)
        tensors[f"{stem}{names.whole}"] = weight(f"{stem}{names.whole}", parts)
    return tensors


def packed_tensor(
    method: str,
    name: str,
    dims: tuple[int, ...],
    parts: Parts,
    values: Callable[[], Array],
    stored: StoredDType,
    coded: Coded | None = None,
) -> PackedTensor:
    """The weight `name` [dims] that parts stand for; see PackedTensor."""
    codes, of = parts["codes"], (*parts.values(),)
    return PackedTensor(name, codes.file, method, dims, codes.offset, codes.n_bytes, of, values, stored, coded)


def misfit(name: str, what: str, parts: Parts) -> LlmcError:
    """The error that parts do not belong together as a weight that is kept as `what`."""
    shapes = " and ".join(f"{part.dtype} {list(part.dims)}" for part in parts.values())
    file: Path = next(iter(parts.values())).file
    return LlmcError(f"tensor {name!r} is no {what}: {shapes}", place=str(file), hint="download the model again")


def is_tensor(tensor: StoredTensor | None, dtypes: tuple[str, ...], *dims: int) -> bool:
    """Whether a tensor is of one of these dtypes, and of this shape."""
    return tensor is not None and tensor.dtype in dtypes and tensor.dims == dims and min(dims, default=1) > 0


def is_matrix(tensor: StoredTensor, dtypes: tuple[str, ...]) -> bool:
    """Whether a tensor is of one of these dtypes, and has rows and columns."""
    return len(tensor.dims) == 2 and is_tensor(tensor, dtypes, *tensor.dims)


def made_for(scales: StoredTensor) -> StoredDType:
    """The dtype of the numbers that these scales make: their own, bfloat16 for float32."""
    return scales.stored_dtype if scales.dtype in ("F16", "BF16") else "bf16"


def float32(tensor: StoredTensor) -> Array:
    """A tensor of scales, float32."""
    return tensor.read_raw().astype(np.float32, copy=False)


class Grid(NamedTuple):
    """Which codes share a scale.  rows: how many rows do, one after the other.  columns: how many columns side by side
    do, or the group of each, int [K].  shape: of all scales."""

    rows: int
    columns: int | Array
    shape: tuple[int, int]


def in_groups(n: int, k: int, size: int) -> Grid:
    """`size` columns of a row share a scale."""
    return in_blocks(n, k, 1, size)


def in_blocks(n: int, k: int, rows: int, columns: int) -> Grid:
    """`rows` by `columns` share a scale."""
    return Grid(min(rows, n), min(columns, k), (-(-n // rows), -(-k // columns)))


def in_order(grid: Grid, order: StoredTensor, columns: Array) -> Grid:
    """The grid with the group of each column, as a tensor names them."""
    k, n_groups = len(columns), grid.shape[1]
    if not 0 <= columns.min() <= columns.max() < n_groups:
        raise LlmcError(f"tensor {order.name!r} names a group that has no scales", place=str(order.file))
    size = -(-k // n_groups)
    return grid._replace(columns=size if np.array_equal(columns, np.arange(k) // size) else columns)


def grid_of(
    scales: StoredTensor,
    n: int,
    k: int,
    groups: Collection[int] = (),
    blocks: Collection[tuple[int, int]] = (),
) -> Grid | None:
    """Which of the codes [n, k] share one of these scales, as their shape says: all, those of a row, of one of these
    groups along K, or of one of these blocks.  None: none of these."""
    known: dict[tuple[int, ...], Grid] = {dims: in_blocks(n, k, n, k) for dims in ((), (1,), (1, 1))}
    known |= {dims: in_groups(n, k, k) for dims in ((n,), (n, 1))}
    some = [*(in_groups(n, k, size) for size in groups), *(in_blocks(n, k, *block) for block in blocks)]
    known |= {grid.shape: grid for grid in reversed(some)}
    return known.get(scales.dims) if scales.dtype in FLOATS else None


def scaled(codes: Array, scales: Array, grid: Grid, zeros: Array | None = None, dtype: Any = np.float32) -> Array:
    """The numbers [N, K], in this dtype, of codes [N, K]; scales, zeros: float32, of the grid's shape but for ones."""
    n, k = codes.shape
    values: Array = np.empty(codes.shape, dtype)
    scales = np.ascontiguousarray(scales).reshape(grid.shape)
    zeros = np.ascontiguousarray(zeros).reshape(grid.shape) if zeros is not None else None
    for first in range(0, n, ROWS_AT_ONCE):
        rows = np.arange(first, min(first + ROWS_AT_ONCE, n)) // grid.rows
        strip = codes[first : first + ROWS_AT_ONCE].astype(np.float32)
        if zeros is not None:
            strip -= by_columns(zeros[rows], grid.columns, k)
        strip *= by_columns(scales[rows], grid.columns, k)
        values[first : first + ROWS_AT_ONCE] = strip
    return values


def by_columns(of_groups: Array, columns: int | Array, k: int) -> Array:
    """What K columns have, [rows, K], of what their groups have, [rows, groups]."""
    if isinstance(columns, int):
        return np.repeat(of_groups, columns, axis=1)[:, :k]
    return np.take(of_groups, columns, axis=1)


def unpacked(words: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """The numbers of `bits` bits in words [a, b], uint8: all of each word's side by side along `axis`.

    order: where the lowest, the next, … of a word goes among them; in their order when None.
    """
    (rows, columns), n = words.shape, 8 * words.itemsize // bits
    of_bytes = np.ascontiguousarray(words).view(np.uint8)
    numbers = np.empty((*of_bytes.shape, 8 // bits), np.uint8)
    for index in range(8 // bits):
        numbers[..., index] = of_bytes >> np.uint8(bits * index) & np.uint8(2**bits - 1)
    numbers = numbers.reshape(rows, columns, n)
    if order is not None:
        numbers = numbers[..., np.argsort(order)]
    return numbers.reshape(rows, -1) if axis == 1 else numbers.swapaxes(1, 2).reshape(-1, columns)

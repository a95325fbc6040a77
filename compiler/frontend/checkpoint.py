"""Safetensors checkpoints: which tensors there are, read one at a time.

A file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}} and the data
(https://huggingface.co/docs/safetensors).  Several files have an index, `model.safetensors.index.json`.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.kernel import numpy_dtype
from llmc.compiler.weights import Array, Coded, StoredDType, Weight
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json
from llmc.runtime.read_file import refuse_pipe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, StoredDType] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
RAW: Mapping[str, str] = {
    **DTYPES,
    "F8_E4M3": "f8",
    "F8_E8M0": "u8",
    "I8": "i8",
    "I32": "i32",
    "I64": "i64",
    "U8": "u8",
}
"""The dtypes in which tensors can be read just as they lie in the file: the file's name for each, and ours."""
WHOLE = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""The file's names of dtypes of whole numbers."""
LONGEST_HEADER = 100_000_000
LONGEST_NAME = 500
"""The longest name of a tensor."""
MOST_AXES, LARGEST_SIZE = 16, 1 << 48
"""The most axes of a tensor, and the largest size of one: products of more, and of larger ones, would take forever."""
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `n_bytes` at `offset` of `file`.  dtype is the file's own name for it (F32, BF16, …)."""

    name: str
    file: Path
    dtype: str
    dims: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What of the file it is made of."""
        return (self,)

    @property
    def stored_dtype(self) -> StoredDType:
        """The dtype in our words; refuses what is not a plain float."""
        if self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise LlmcError(
                f"tensor {self.name!r} has the unsupported dtype {self.dtype}",
                place=str(self.file),
                hint=f"save the checkpoint in one of {known}, or as a quantised one that config.json describes",
            )
        return DTYPES[self.dtype]

    def read(self) -> Array:
        """The tensor's values, read from the file now."""
        return self._read(numpy_dtype(self.stored_dtype))

    def read_raw(self) -> Array:
        """What lies in the file, of a dtype in RAW: codes, and what belongs to them."""
        return self._read(numpy_dtype(RAW[self.dtype]))

    def read_bytes(self) -> Array:
        """All of its bytes, uint8 [n_bytes]."""
        return self._read(np.dtype(np.uint8), (self.n_bytes,))

    def _read(self, dtype: np.dtype[Any], dims: tuple[int, ...] | None = None) -> Array:
        dims = self.dims if dims is None else dims
        count = prod(dims)
        with self.file.open("rb") as stream:
            array = np.fromfile(stream, dtype, count, offset=self.offset)
        if array.size != count:
            raise LlmcError(f"the file was shortened while it was read: {self.name}", place=str(self.file))
        return array.reshape(dims)

    @property
    def coded(self) -> Coded | None:
        """How its values are kept, if as codes of few bits."""
        return None

    def weight(self, name: str) -> Weight:
        return Weight(name, self.dims, self.read, self.stored_dtype, self.coded)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's checkpoint, by name.  Reads headers only."""
    index = folder / INDEX
    if index.is_file():
        return _open_shards(folder, index)
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise LlmcError(
                "the checkpoint is in PyTorch's pickle format, which can run code when it is read",
                place=str(pickles[0]),
                hint="convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)",
            )
        raise LlmcError(
            "the folder has no weights",
            place=str(folder),
            hint=f"it needs {SINGLE} or {INDEX}; --weights random makes some up",
        )
    return _merge(read_header(file) for file in files)


def _open_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = parse_json(index.read_bytes())["weight_map"]
        shards = sorted(set(map(str, weight_map.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmcError("the checkpoint's index is not a table of tensors and files", place=str(index)) from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise LlmcError(
            f"the checkpoint's file {missing[0]} is missing{more}",
            place=str(index),
            hint="download the model again; the index names all of its files",
        )
    return _merge(read_header(folder / shard) for shard in shards)


def _merge(tables: Iterable[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for table in tables:
        tensors.update(table)
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.  Checks that every one lies within the file, has its shape's size and its
    bytes for itself."""
    refuse_pipe(file)
    n_file = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (n_header,) = struct.unpack("<Q", stream.read(8))
            if n_header > min(n_file - 8, LONGEST_HEADER):
                raise LlmcError("the file is truncated, or is not safetensors", place=str(file))
            header: dict[str, Any] = parse_json(stream.read(n_header))
        header.pop("__metadata__", None)
        tensors = {name: _stored_tensor(name, file, 8 + n_header, entry) for name, entry in header.items()}
    except (struct.error, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise LlmcError("the file is truncated, or is not safetensors", place=str(file)) from error
    for tensor in tensors.values():
        dtype = RAW.get(tensor.dtype)
        n_bytes = prod(tensor.dims) * numpy_dtype(dtype).itemsize if dtype else tensor.n_bytes
        check_end(tensor, n_file)
        if tensor.offset < 8 + n_header or tensor.n_bytes != n_bytes:
            raise LlmcError(f"tensor {tensor.name!r} has the wrong number of bytes for its shape", place=str(file))
    check_apart(tensors)
    return tensors


def check_end(tensor: StoredTensor, n_file: int) -> None:
    """Refuse a tensor that does not end in its file, of so many bytes."""
    if tensor.offset + tensor.n_bytes > n_file:
        raise LlmcError(
            f"the file is truncated: {n_file} bytes, but tensor {tensor.name!r} ends at "
            f"{tensor.offset + tensor.n_bytes}",
            place=str(tensor.file),
            hint="download the model again",
        )


def check_apart(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors of one file that share bytes."""
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.n_bytes))
    for one, other in pairwise(in_order):
        if one.offset + one.n_bytes > other.offset:
            fact = f"the file gives the same bytes to two tensors, {one.name!r} and {other.name!r}"
            raise LlmcError(fact, place=str(one.file), hint="download the model again")


def _stored_tensor(name: str, file: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    dtype = str(entry["dtype"])
    if len(name) > LONGEST_NAME or len(dtype) > LONGEST_NAME or not dtype.isidentifier():
        raise ValueError("it is no tensor's name or dtype")
    dims = tuple(map(int, entry["shape"]))
    if len(dims) > MOST_AXES or not all(0 <= size < LARGEST_SIZE for size in dims):
        raise ValueError("it is no tensor's shape")
    return StoredTensor(name, file, dtype, dims, data + start, stop - start)


def most_common_dtype(checkpoint: Mapping[str, StoredTensor]) -> StoredDType:
    """The dtype that most bytes of a checkpoint are in.  Whole numbers are no weights: positions and the like, which
    older versions of transformers saved too (`embeddings.position_ids` in most of BERT's checkpoints)."""
    n_bytes: Counter[StoredDType] = Counter()
    for tensor in checkpoint.values():
        if isinstance(tensor, StoredTensor) and tensor.dtype in WHOLE:
            continue
        n_bytes[tensor.stored_dtype] += tensor.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else "f32"


def sample(checkpoint: Mapping[str, StoredTensor]) -> bytes:
    """A digest that tells checkpoints apart: of every tensor's name, type and shape, and a few KiB from its middle."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        for tensor in checkpoint[name].parts:
            digest.update(f"{name} {tensor.dtype} {tensor.dims}".encode())
            with tensor.file.open("rb") as stream:
                stream.seek(tensor.offset + max(0, tensor.n_bytes - SAMPLE_BYTES) // 2)
                digest.update(stream.read(min(SAMPLE_BYTES, tensor.n_bytes)))
    return digest.digest()

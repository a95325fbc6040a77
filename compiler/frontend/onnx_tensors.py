"""Tensors of an .onnx file and of the files beside it: checked before anything is read, and read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.weights import Array, StoredDType, Weight
from llmc.runtime.errors import LlmcError

Tensor = onnx.TensorProto
STORED: dict[ir.DataType, tuple[str, StoredDType]] = {
    ir.DataType.FLOAT: ("F32", "f32"),
    ir.DataType.FLOAT16: ("F16", "f16"),
    ir.DataType.BFLOAT16: ("BF16", "bf16"),
}
TYPED: dict[int, str] = {Tensor.FLOAT: "float_data", Tensor.DOUBLE: "double_data", Tensor.INT64: "int64_data"}
"""Where numbers lie that are not raw bytes; those of all other types in int32_data."""
EXTERNAL_KEYS = ("location", "offset", "length", "checksum", "basepath")
HINT = "download the file again, with those beside it"


def check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Every tensor has as many bytes as its shape says, within the file or in one of the same folder."""
    for tensor in tensors_of(model):
        place = f"tensor {tensor.name} of {path}"
        if tensor.data_type not in BYTES:
            raise LlmcError("the tensor has a type that is not compiled", place=place)
        if any(size < 0 for size in tensor.dims):
            raise LlmcError("the tensor has a negative size", place=place)
        wanted = prod(tensor.dims) * BYTES[tensor.data_type]
        if tensor.data_location == Tensor.EXTERNAL:
            check_external(tensor, wanted, path)
        elif tensor.raw_data or not prod(tensor.dims):
            if len(tensor.raw_data) != wanted:
                fact = f"the tensor has {len(tensor.raw_data)} bytes; its shape {list(tensor.dims)} makes it {wanted}"
                raise LlmcError(fact, place=place, hint=HINT)
        elif len(getattr(tensor, TYPED.get(tensor.data_type, "int32_data"))) != prod(tensor.dims):
            raise LlmcError(f"the tensor has not as many numbers as its shape {list(tensor.dims)}", place=place)


BYTES: dict[int, int] = {
    Tensor.BOOL: 1,
    Tensor.INT8: 1,
    Tensor.UINT8: 1,
    Tensor.INT16: 2,
    Tensor.FLOAT16: 2,
    Tensor.BFLOAT16: 2,
    Tensor.INT32: 4,
    Tensor.FLOAT: 4,
    Tensor.INT64: 8,
    Tensor.DOUBLE: 8,
}
"""Bytes of one element, for the types that a decoder has."""


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors of the graph, and of the functions that it calls."""
    yield from model.graph.initializer
    for node in chain(model.graph.node, *(function.node for function in model.functions)):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def check_external(tensor: onnx.TensorProto, wanted: int, path: Path) -> None:
    """The tensor's bytes lie in a file of the same folder."""
    place = f"tensor {tensor.name} of {path}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    strange = [key for key in entries if key not in EXTERNAL_KEYS]
    if strange:
        fact = f"where the tensor lies is not understood: {strange[0]!r}"
        raise LlmcError(fact, place=place, hint=HINT)
    name = PurePosixPath(location)
    leaves = name.is_absolute() or ".." in name.parts or PureWindowsPath(location).is_absolute()
    if not location or "\0" in location or leaves:
        fact = f"the tensor's file {location!r} is none of the model's folder"
        raise LlmcError(fact, place=place, hint="keep the files of one model in one folder")
    file = path.parent / location
    # A download may be links into a store of files, as the hub's cache is: then both link to one folder.
    at = file.resolve()
    if at.parent != path.resolve().parent and not at.is_relative_to(path.parent.resolve()):
        raise LlmcError(f"the tensor's file {location!r} is a link to another folder", place=place)
    if not file.is_file():
        raise LlmcError(f"the file {location} with the weights is missing", place=place, hint=HINT)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
    except ValueError as error:
        raise LlmcError("the tensor's place in its file is no number", place=place) from error
    if offset < 0 or length != wanted:
        fact = f"the tensor has {length} bytes; its shape {list(tensor.dims)} makes it {wanted}"
        raise LlmcError(fact, place=place, hint=HINT)
    n_file = file.stat().st_size
    if offset + length > n_file:
        fact = f"the file {location} is truncated: {n_file} bytes, but the tensor ends at {offset + length}"
        raise LlmcError(fact, place=place, hint=HINT)


def weight_of(tensor: ir.TensorProtocol, name: str, path: Path) -> Weight:
    """The weight, unread, in the dtype of the file: f32, f16 or bf16."""
    their_name, dtype = STORED[tensor.dtype]
    dims = tuple(int(size) for size in tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        file = path.parent / tensor.location
        n_bytes = prod(dims) * (4 if dtype == "f32" else 2)
        return StoredTensor(name, file, their_name, dims, tensor.offset or 0, n_bytes).weight(name)

    def read() -> Array:
        return tensor.numpy()

    return Weight(name, dims, read, dtype)

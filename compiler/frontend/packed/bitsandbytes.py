"""Weights as bitsandbytes keeps them: tables of 16 numbers with a scale for each block, or int8 with one for each row.

4 bits (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): NAME.weight, bytes [N K / 2, 1]: two codes, the first in the
high half, all of the weight one after the other; NAME.weight.quant_map, float32 [16]: their numbers (nf4 or fp4);
NAME.weight.absmax [blocks]: what a block is multiplied by, float32, or bytes where these are quantised in turn:

    absmax[i] = nested_quant_map[byte[i]] * nested_absmax[i / nested_blocksize] + nested_offset

NAME.weight.quant_state.bitsandbytes__nf4 (or __fp4): the sizes, as JSON in bytes.

int8 (Dettmers et al. 2022, arXiv:2208.07339): NAME.weight, int8 [N, K], times NAME.SCB, float32 [N], over 127.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.packed.settings import Settings
from llmc.compiler.frontend.packed.tensor import (
    Checkpoint,
    Names,
    PackedTensor,
    Parts,
    float32,
    in_groups,
    is_matrix,
    is_tensor,
    join,
    misfit,
    packed_tensor,
    scaled,
)
from llmc.compiler.weights import Array, StoredDType
from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

STATE = ".weight.quant_state.bitsandbytes__"
INT8 = Names(".weight", {"codes": ".weight", "scales": ".SCB"}, unused=(".weight_format",))
LONGEST_STATE = 4096
LARGEST_OFFSET = 1e38
ROW_MAJOR = 0
STORED: dict[str, StoredDType] = {"float16": "f16", "bfloat16": "bf16", "float32": "bf16"}


def bitsandbytes(settings: Settings) -> Packing:
    """How a checkpoint of bitsandbytes is read."""
    if settings.fields.get("load_in_8bit") is True:
        return Packing("bitsandbytes, int8 with a scale a row", join_int8, "int8")
    kind = settings.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    names = Names(
        ".weight",
        {"codes": ".weight", "map": ".weight.quant_map", "scales": ".weight.absmax", "state": f"{STATE}{kind}"},
        {"nested_map": ".weight.nested_quant_map", "nested_scales": ".weight.nested_absmax"},
        marks=(f"{STATE}{kind}", ".weight.absmax"),
    )
    return Packing(f"bitsandbytes, {kind}", lambda found: join(found, names, partial(table_weight, kind=kind)), "int4")


def join_int8(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each weight's codes and scales.  Reads only how codes lie."""
    for name, tensor in checkpoint.items():
        if name.endswith(".weight_format") and (tensor.dtype != "U8" or (tensor.read_raw() != ROW_MAJOR).any()):
            raise LlmcError(f"tensor {name!r} says that codes do not lie by rows", place=str(tensor.file))
    return join(checkpoint, INT8, int8_weight)


def int8_weight(name: str, parts: Parts) -> PackedTensor:
    codes, scales = parts["codes"], parts["scales"]
    if not (is_matrix(codes, ("I8",)) and is_tensor(scales, ("F32",), codes.dims[0])):
        raise misfit(name, "int8 with scales for rows", parts)
    n, k = codes.dims

    def read() -> Array:
        return scaled(codes.read_raw(), float32(scales) / np.float32(127), in_groups(n, k, k))

    return packed_tensor("bitsandbytes", name, (n, k), parts, read, "bf16")


def table_weight(name: str, parts: Parts, *, kind: str) -> PackedTensor:
    codes, table, scales, state = (parts[part] for part in ("codes", "map", "scales", "state"))
    error = misfit(name, f"weight in {kind}", parts)
    said = state_of(state)
    shape, size = said.get("shape"), said.get("blocksize", 0)
    if not (isinstance(shape, list) and len(shape) == 2 and all(is_count(each) for each in (*shape, size))):
        raise error
    n, k = shape
    n_blocks, size = -(-n * k // size), min(size, n * k)
    fits = (
        codes.dtype == "U8"
        and codes.n_bytes == -(-n * k // 2)
        and is_tensor(table, ("F32",), 16)
        and is_tensor(scales, ("U8", "F32"), n_blocks)
    )
    nested = (
        parts.get("nested_map"),
        parts.get("nested_scales"),
        said.get("nested_blocksize"),
        said.get("nested_offset"),
    )
    if not fits or (scales.dtype == "U8" and not is_nested(nested, n_blocks)):
        raise error

    def read() -> Array:
        each = float32(scales) if scales.dtype == "F32" else unnested(scales, nested)
        pairs = codes.read_raw().reshape(-1)
        values = np.empty((n_blocks * size,), np.float32)
        numbers = float32(table)[np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[: n * k]]
        values[: n * k] = numbers
        values = values.reshape(n_blocks, size)
        values *= each[:, None]
        return values.reshape(-1)[: n * k].reshape(n, k)

    return packed_tensor("bitsandbytes", name, (n, k), parts, read, STORED.get(str(said.get("dtype")), "bf16"))


def is_count(value: object) -> bool:
    return type(value) is int and value > 0


def state_of(state: StoredTensor) -> dict[str, Any]:
    """The sizes that bitsandbytes writes beside a weight."""
    try:
        if state.dtype != "U8" or state.n_bytes > LONGEST_STATE:
            raise ValueError
        said = parse_json(state.read_raw().tobytes())
        if not isinstance(said, dict):
            raise ValueError
    except ValueError as error:
        raise LlmcError(f"tensor {state.name!r} is no JSON of bitsandbytes", place=str(state.file)) from error
    return said


def is_nested(nested: tuple[Any, ...], n_blocks: int) -> bool:
    """Whether absmax is quantised in turn, with all that this takes."""
    table, scales, size, offset = nested
    if not (is_count(size) and isinstance(offset, float | int) and abs(offset) < LARGEST_OFFSET):
        return False
    return is_tensor(table, ("F32",), 256) and is_tensor(scales, ("F32",), -(-n_blocks // size))


def unnested(scales: StoredTensor, nested: tuple[Any, ...]) -> Array:
    """absmax, float32, of its bytes."""
    table, of_blocks, size, offset = nested
    found: Array = float32(table)[scales.read_raw()]
    found *= np.repeat(float32(of_blocks), min(size, found.size))[: found.size]
    found += np.float32(offset)
    return found

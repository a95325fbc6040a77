"""Weights as compressed-tensors keeps them (vLLM's llm-compressor): integers and floats of 8 or 4 bits with scales.

    number[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]

pack-quantized   NAME.weight_packed, int32 [N, ceil(K B / 32)]: codes of B bits plus 2**(B-1), neighbours along K in a
                 word, the first lowest; NAME.weight_shape: N, K; NAME.weight_zero_point, int32 [ceil(N B / 32),
                 groups]: zeros in the same way along N
int-quantized    NAME.weight, int8 [N, K]; NAME.weight_zero_point, int8 [N, groups]
float-quantized  NAME.weight, e4m3fn [N, K]
nvfp4            NAME.weight_packed, bytes [N, K / 2]: two of e2m1 (mxfp4.py), the first in the low half;
                 NAME.weight_scale, e4m3fn [N, K / 16], divided by NAME.weight_global_scale, float32 [1]

NAME.weight_scale: [N, groups], for whole rows [N, 1], for the tensor [1], for blocks [ceil(N/R), ceil(K/C)].
NAME.weight_g_idx, int [K]: the group of each k; negative: they are in order.  Which of these it is, tensors say.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed import float8
from llmc.compiler.frontend.packed.mxfp4 import E2M1
from llmc.compiler.frontend.packed.packing import Packing, in_int4
from llmc.compiler.frontend.packed.settings import Settings
from llmc.compiler.frontend.packed.tensor import (
    Checkpoint,
    Grid,
    Names,
    PackedTensor,
    Parts,
    float32,
    grid_of,
    in_groups,
    in_order,
    is_matrix,
    is_tensor,
    join,
    made_for,
    misfit,
    packed_tensor,
    scaled,
    unpacked,
)
from llmc.compiler.weights import Array, Coded
from llmc.runtime.errors import shortened

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mixed-precision",
    "dense",
)
STRATEGIES = ("group", "channel", "tensor", "block", "tensor_group")
SMALL = {"int4": "int4", "int8": "int8", "float8": "fp8", "float4": "int4"}
"""The `--quant` whose codes have as many bits."""
INTEGERS = ("I32", "I64")
OPTIONAL = {"zeros": ".weight_zero_point", "order": ".weight_g_idx"}
UNUSED = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point")
WORDS = Names(
    ".weight",
    {"codes": ".weight_packed", "scales": ".weight_scale"},
    {"shape": ".weight_shape", "whole": ".weight_global_scale", **OPTIONAL},
    UNUSED,
    marks=(".weight_packed",),
)
BYTES = Names(".weight", {"codes": ".weight", "scales": ".weight_scale"}, OPTIONAL, UNUSED)
NVFP4_GROUP = 16


class How(NamedTuple):
    """How the weights of one of the configuration's groups are kept.  group: along K, 0: the row; block: R and C."""

    kind: str
    strategy: str
    bits: int
    group: int
    block: tuple[int, int] | None

    def __str__(self) -> str:
        number = f"{'floats' if self.kind == 'float' else 'integers'} of {self.bits} bits"
        of = {"group": f"in groups of {self.group}", "tensor_group": f"in groups of {self.group}", "channel": "a row"}
        if self.block is not None:
            return f"{number}, a scale for each {self.block[0]} by {self.block[1]}"
        return f"{number} {of.get(self.strategy, 'a tensor')}"


def compressed_tensors(settings: Settings) -> Packing:
    """How a checkpoint of compressed-tensors is read."""
    settings.one_of("format", FORMATS)
    if settings.table("transform_config").get("config_groups"):
        raise settings.refused("a transform_config, which turns activations as they are computed")
    if settings.table("sparsity_config").get("format", "dense") != "dense":
        raise settings.refused("a sparsity_config")
    groups = [settings.within(group) for group in settings.table("config_groups").values() if isinstance(group, dict)]
    weights = [each.within(table) for each in groups if (table := each.table("weights"))]
    kept = tuple(dict.fromkeys(map(how_of, weights)))
    if not kept:
        raise settings.refused("no config_groups of weights", "download the model again")
    inputs = [table for each in groups if (table := each.table("input_activations"))]
    acted = f"{shortened(inputs[0].get('type'))}{shortened(inputs[0].get('num_bits'))}" if inputs else ""
    wide = max(kept, key=lambda how: how.bits)
    small = SMALL[f"{wide.kind}{wide.bits}"]
    is_symmetric = all(each.fields.get("symmetric", True) is True for each in weights)
    if small == "int4" and wide.kind == "int":
        small = in_int4(wide.group)
    return Packing(
        f"compressed-tensors: {'; '.join(map(str, kept))}{', with zeros' * (not is_symmetric)}",
        partial(joined, kept=kept),
        small,
        float8.activations(acted) if acted else (),
    )


def how_of(settings: Settings) -> How:
    """How the weights of a group are kept, checked."""
    kind = settings.one_of("type", ("int", "float"), "int")
    bits = settings.one_of("num_bits", (4, 8))
    strategy = settings.one_of("strategy", STRATEGIES)
    if strategy == "block":
        return How(kind, strategy, bits, 0, settings.block("block_structure"))
    group = settings.number("group_size", 1) if "group" in strategy else 0
    if (kind, bits) == ("float", 4) and (strategy, group) != ("tensor_group", NVFP4_GROUP):
        raise settings.refused(f"floats of 4 bits in groups of {group}", "of these, llmc reads nvfp4")
    return How(kind, strategy, bits, group, None)


def joined(checkpoint: Checkpoint, kept: tuple[How, ...]) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each weight's parts.  Reads no tensor but those that say shapes."""
    tensors = join(checkpoint, WORDS, partial(of_words, kept=kept))
    return join(tensors, BYTES, partial(of_bytes, kept=kept))


def of_words(name: str, parts: Parts, *, kept: tuple[How, ...]) -> PackedTensor:
    """A weight whose codes lie several in a word, or two in a byte."""
    return nvfp4(name, parts) if "whole" in parts else packed_integers(name, parts, kept)


def packed_integers(name: str, parts: Parts, kept: tuple[How, ...]) -> PackedTensor:
    codes, scales, zeros, shape = parts["codes"], parts["scales"], parts.get("zeros"), parts.get("shape")
    error = misfit(name, "integers packed in words, with scales", parts)
    if not (is_matrix(codes, ("I32",)) and is_tensor(shape, INTEGERS, 2)):
        raise error
    assert shape is not None
    n, k = map(int, shape.read_raw())
    bits = next((how.bits for how in kept if codes.dims == (n, -(-k * how.bits // 32))), None)
    grid = columns_of(parts, n, k, kept) if bits is not None else None
    if bits is None or grid is None:
        raise error
    in_words, in_bytes = (-(-n * bits // 32), grid.shape[1]), grid.shape
    if not (zeros is None or is_tensor(zeros, ("I32",), *in_words) or is_tensor(zeros, ("I8",), *in_bytes)):
        raise error

    def read() -> Array:
        offsets: Array = np.full(grid.shape, 2 ** (bits - 1), np.float32)
        if zeros is not None and zeros.dtype == "I32":
            offsets = unpacked(zeros.read_raw(), bits, 0)[:n].astype(np.float32)
        elif zeros is not None:
            offsets += zeros.read_raw().astype(np.float32)
        return scaled(unpacked(codes.read_raw(), bits, 1)[:, :k], float32(scales), grid_read(grid, parts), offsets)

    is_side_by_side = isinstance(grid.columns, int) and "order" not in parts
    coded = Coded(bits, int(grid.columns) if is_side_by_side else 0, zeros is not None)
    return packed_tensor("compressed-tensors", name, (n, k), parts, read, made_for(scales), coded)


def of_bytes(name: str, parts: Parts, *, kept: tuple[How, ...]) -> PackedTensor:
    """A weight of codes of 8 bits."""
    codes, scales, zeros = parts["codes"], parts["scales"], parts.get("zeros")
    fits = is_matrix(codes, ("I8", float8.DTYPE))
    grid = columns_of(parts, codes.dims[0], codes.dims[1], kept) if fits else None
    if grid is None or (zeros is not None and not (zeros.dtype == codes.dtype and zeros.dims == scales.dims)):
        raise misfit(name, "codes of 8 bits with scales", parts)

    def read() -> Array:
        offsets = None if zeros is None else zeros.read_raw().astype(np.float32)
        return scaled(codes.read_raw(), float32(scales), grid_read(grid, parts), offsets)

    return packed_tensor("compressed-tensors", name, codes.dims, parts, read, made_for(scales), Coded(8))


def columns_of(parts: Parts, n: int, k: int, kept: tuple[How, ...]) -> Grid | None:
    """Which codes share a scale, of columns in order; None where the parts' shapes don't go together."""
    order = parts.get("order")
    if min(n, k) < 1 or (order is not None and not is_tensor(order, INTEGERS, k)):
        return None
    blocks = [how.block for how in kept if how.block is not None]
    return grid_of(parts["scales"], n, k, [how.group for how in kept if how.group], blocks)


def grid_read(grid: Grid, parts: Parts) -> Grid:
    """The grid with the groups of columns that a tensor names, if one does."""
    order = parts.get("order")
    if order is None or (columns := order.read_raw()).min() < 0:
        return grid
    return in_order(grid, order, columns)


def nvfp4(name: str, parts: Parts) -> PackedTensor:
    codes, scales, whole = parts["codes"], parts["scales"], parts["whole"]
    n, k = (codes.dims[0], 2 * codes.dims[1]) if len(codes.dims) == 2 else (0, 0)
    fits = is_tensor(codes, ("U8",), n, k // 2) and is_tensor(scales, (float8.DTYPE,), n, k // NVFP4_GROUP)
    if not fits or k % NVFP4_GROUP or not (is_tensor(whole, ("F32",), 1) or is_tensor(whole, ("F32",))):
        raise misfit(name, "nvfp4 with scales", parts)

    def read() -> Array:
        values = E2M1[unpacked(codes.read_raw(), 4, 1)]
        return scaled(values, float32(scales) / float32(whole).reshape(()), in_groups(n, k, NVFP4_GROUP))

    return packed_tensor("nvfp4", name, (n, k), parts, read, "bf16")

"""Weights in GPTQ and AWQ: codes of a few bits, packed in words, with a scale and a zero for each group along K.

    number[n, k] = (code[n, k] - zero[g, n]) * scale[g, n]

GPTQ, Frantar et al. 2022, arXiv:2210.17323, as GPTQ packages write it.  NAME.qweight, int32 [K B / 32, N]: B bits a
code, those of 32 / B rows in a word, the first lowest.  NAME.qzeros, int32 [groups, N B / 32]: zeros, of neighbouring
columns in a word; in the format "gptq" less one each (a word less 0x11111111, borrows and all), in "gptq_v2" as they
are.  NAME.scales [groups, N].  NAME.g_idx, int32 [K]: the group of each k; they are in order unless columns were sorted
by what they weigh (act-order, `desc_act`).

AWQ, Lin et al. 2023, arXiv:2306.00978, in the layout "gemm".  NAME.qweight, int32 [K, N / 8], and NAME.qzeros, int32
[groups, N / 8]: four bits each, a word's eight in the order of ORDER; NAME.scales [groups, N].
"""

from __future__ import annotations

from functools import partial

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.packing import Packing, in_int4
from llmc.compiler.frontend.packed.settings import Settings
from llmc.compiler.frontend.packed.tensor import (
    FLOATS,
    Checkpoint,
    Grid,
    Names,
    PackedTensor,
    Parts,
    float32,
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
from llmc.runtime.errors import LlmcError

PARTS = {"codes": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
GPTQ, AWQ = Names(".weight", PARTS, {"order": ".g_idx"}), Names(".weight", PARTS)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours along N lies in a word's first, second, … four bits in AWQ."""
BITS = (4, 8, 2)
"""Bits of a code in GPTQ; codes of three bits lie across words, and are not read."""
WHOLE_ROW = -1
"""The group size that stands for all of K."""


def gptq(settings: Settings) -> Packing:
    """How a checkpoint in GPTQ is read."""
    if settings.fields.get("is_marlin_format"):
        raise settings.refused("the format marlin", "look for a checkpoint in the format gptq")
    name = "checkpoint_format" if "checkpoint_format" in settings.fields else "format"
    version = settings.one_of(name, ("gptq", "gptq_v2"), "gptq")
    bits = settings.one_of("bits", BITS)
    group = settings.number("group_size", WHOLE_ROW, WHOLE_ROW)
    said = f"{'GPTQ' if version == 'gptq' else 'GPTQ v2'}, {bits} bits {group_words(group)}"
    said += ", symmetric" if settings.fields.get("sym") is True else ", with zeros"
    said += ", in act-order" * (settings.fields.get("desc_act") is True and group != WHOLE_ROW)
    sorted_, zeros = settings.fields.get("desc_act") is True, settings.fields.get("sym") is not True
    weight = partial(gptq_weight, bits=bits, group=group, less=int(version == "gptq"), sorted_=sorted_, zeros=zeros)
    return Packing(said, lambda checkpoint: join(checkpoint, GPTQ, weight), in_int4(group) if bits <= 4 else "int8")


def awq(settings: Settings) -> Packing:
    """How a checkpoint in AWQ is read."""
    settings.one_of("version", ("gemm", "GEMM"), "gemm")
    bits = settings.one_of("bits", (4,))
    group = settings.number("group_size", WHOLE_ROW, WHOLE_ROW)
    weight = partial(awq_weight, group=group)

    def joined(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
        scales = next((name for name in checkpoint if name.endswith(".act.scales")), None)
        if scales is not None:
            fact = f"activations are divided by {scales!r}, which the model does not know"
            raise LlmcError(fact, place=str(checkpoint[scales].file), hint="look for another checkpoint of the model")
        return join(checkpoint, AWQ, weight)

    return Packing(f"AWQ, {bits} bits {group_words(group)}, with zeros", joined, in_int4(group))


def group_words(group: int) -> str:
    return "a row" if group == WHOLE_ROW else f"in groups of {group}"


def gptq_weight(
    name: str, parts: Parts, *, bits: int, group: int, less: int, sorted_: bool, zeros: bool
) -> PackedTensor:
    """less: what was taken away from zeros.  sorted_: whether columns of a group may lie apart.  zeros: whether zeros
    may be others than the middle.  Where columns have their groups, their number says how many bits it is."""
    codes, offsets, scales, order = parts["codes"], parts["zeros"], parts["scales"], parts.get("order")
    error = misfit(name, f"GPTQ of {bits} bits {group_words(group)}", parts)
    if not (is_matrix(codes, ("I32",)) and is_matrix(scales, FLOATS)):
        raise error
    if order is not None and len(order.dims) == 1 and order.dims[0] > 0:
        bits = codes.dims[0] * 32 // order.dims[0]
    if bits not in BITS:
        raise error
    (n_groups, n), k = scales.dims, codes.dims[0] * 32 // bits
    size = k if group == WHOLE_ROW else max(group, 1)
    fits = (
        is_tensor(codes, ("I32",), k * bits // 32, n)
        and is_tensor(offsets, ("I32",), n_groups, n * bits // 32)
        and (is_tensor(order, ("I32", "I64"), k) if order is not None else n_groups == -(-k // size))
        and n * bits % 32 == 0
    )
    if not fits:
        raise error

    def read() -> Array:
        grid = Grid(1, min(size, k), (n, n_groups))
        if order is not None:
            grid = in_order(grid, order, order.read_raw())
        words = offsets.read_raw().view(np.uint32) + np.uint32(less * (2**32 - 1) // (2**bits - 1))
        of_groups = unpacked(words, bits, 1).astype(np.float32)
        numbers = unpacked(np.ascontiguousarray(codes.read_raw().T), bits, 1)
        return scaled(numbers, float32(scales).T, grid, of_groups.T)

    coded = Coded(bits, 0 if sorted_ and group != WHOLE_ROW else size, zeros)
    return packed_tensor("gptq", name, (n, k), parts, read, made_for(scales), coded)


def awq_weight(name: str, parts: Parts, *, group: int) -> PackedTensor:
    codes, zeros, scales = (parts[part] for part in PARTS)
    error = misfit(name, f"AWQ of 4 bits {group_words(group)}", parts)
    if not (is_matrix(codes, ("I32",)) and is_matrix(scales, FLOATS)):
        raise error
    k, (n_groups, n) = codes.dims[0], scales.dims
    size = k if group == WHOLE_ROW else max(group, 1)
    fits = (
        is_tensor(codes, ("I32",), k, n // 8)
        and is_tensor(zeros, ("I32",), n_groups, n // 8)
        and n % 8 == 0
        and n_groups == -(-k // size)
    )
    if not fits:
        raise error

    def read() -> Array:
        offsets = unpacked(zeros.read_raw(), 4, 1, ORDER).astype(np.float32)
        numbers = np.ascontiguousarray(unpacked(codes.read_raw(), 4, 1, ORDER).T)
        return scaled(numbers, float32(scales).T, in_groups(n, k, size), offsets.T)

    return packed_tensor("awq", name, (n, k), parts, read, made_for(scales), Coded(4, size, zeros=True))

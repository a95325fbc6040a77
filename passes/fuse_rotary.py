"""Recognise rotary embedding where it is spelled out, or applied to a part of each head.

rewrite:
    Add(Mul(x, C), Mul(Concat(Neg(x[…, RD/2:]), x[…, :RD/2]), S))        C = Cos(Concat(f, f)), S = Sin(Concat(f, f)),
    -->                                                                  or C, S = Concat(c, c), Concat(s, s)
    RotaryEmbedding(x, C[…, :RD/2], S[…, :RD/2])

    the same by pairs (2i, 2i + 1), as interleaved_rotary.py shows it
    -->
    RotaryEmbedding(x, C[…, ::2], S[…, ::2], interleaved=1)

    a, b = Split(x)
    Concat(Sub(Mul(a, C), Mul(b, S)), Add(Mul(b, C), Mul(a, S)))          C, S [B, 1, S, RD/2]
    -->
    RotaryEmbedding(x, C, S)
    Concat(a C - b S, b C + a S)                                          a = x[…, ::2], b = x[…, 1::2]
    -->
    RotaryEmbedding(Concat(a, b), C, S)

    Reshape(Concat([a C - b S], [b C + a S]))                             the same, pairs left where they are
    -->
    RotaryEmbedding(x, C, S, interleaved=1)

    Concat(RotaryEmbedding(x[…, :r], cos, sin), x[…, r:])
    -->
    RotaryEmbedding(x, cos, sin, rotary_embedding_dim=r)

    any of these of heads [batch, sequence, heads, D]
    -->
    Transpose(RotaryEmbedding(Transpose(x), …))
refuses: halves cut elsewhere than in the middle or on another axis; a C or S whose halves are not the same by
construction; heads that are neither [batch, heads, sequence, D] nor [batch, sequence, heads, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, is_last_axis, number, producer, replace
from llmc.compiler.graph.shapes import dims
from llmc.passes.interleaved_rotary import (
    Waves,
    heads_axis,
    pairs_in_place,
    rotate_pairs,
    turned_pairs,
    turned_parts,
    unsqueezed,
    waves_by_pairs,
)
from llmc.passes.slices import first_part, part_of, size_of

SWAPPED = [0, 2, 1, 3]


def fuse_rotary(model: ir.Model) -> int:
    """Assumes the exported graph; leaves standard RotaryEmbedding nodes. Returns the number of rewrites."""
    return fuse_halves(model) + fuse_spelled_out(model) + fuse_pairs(model) + fuse_partial(model)


def fuse_spelled_out(model: ir.Model) -> int:
    n_rewrites = 0
    halves: dict[ir.Value, ir.Value] = {}  # one of each, since attention must see that q and k are turned alike
    for node in list(model.graph):
        match = spelled_out(node) if node.op_type == "Add" else None
        if match is None:
            continue
        for root, make in match.waves:
            if root not in halves:
                halves[root] = make(node)
        angles = [halves[root] for root, _ in match.waves]
        settings = {"num_heads": match.n_heads, "interleaved": match.interleaved}
        replace(node.outputs[0], turn(node, match.x, angles, match.axis, settings))
        n_rewrites += 1
    return n_rewrites


class Rotation(NamedTuple):
    """x [B, H, S, RD], or [B, S, H, RD] where axis, that of the heads, is 2; its cosines and its sines [B, S, RD/2]."""

    x: ir.Value
    waves: tuple[Waves, Waves]
    interleaved: int
    axis: int

    @property
    def n_heads(self) -> int:
        size = dims(self.x)[self.axis]
        assert isinstance(size, int)
        return size


def turn(
    before: ir.Node, x: ir.Value, angles: Sequence[ir.Value | None], axis: int, settings: Mapping[str, Any]
) -> ir.Value:
    """x by RotaryEmbedding, whose heads are in axis 1."""
    if axis == 1:
        return emit(before, "RotaryEmbedding", [x, *angles], **settings)[0]
    x = emit(before, "Transpose", [x], perm=SWAPPED)[0]
    result = emit(before, "RotaryEmbedding", [x, *angles], **settings)
    return emit(before, "Transpose", result, perm=SWAPPED)[0]


def spelled_out(add: ir.Node) -> Rotation | None:
    straight, turned = (producer(value, "Mul") for value in add.inputs)
    if straight is None or turned is None:
        return None
    for a, b in ((straight, turned), (turned, straight)):
        for x, cos in (a.inputs, reversed(a.inputs)):
            for y, sin in (b.inputs, reversed(b.inputs)):
                match = rotation(x, y, cos, sin) if x is not None and len(dims(x)) == 4 else None
                if match is not None:
                    return match
    return None


def rotation(x: ir.Value, y: ir.Value | None, cos: ir.Value | None, sin: ir.Value | None) -> Rotation | None:
    """The rotation that computes x cos + y sin, if y is x with its halves, or its pairs, exchanged and one negated."""
    by_pairs = rotate_half(y) is not x
    if by_pairs and rotate_pairs(y) is not x:
        return None
    read, axis = waves_by_pairs if by_pairs else waves_by_halves, heads_axis(x)
    cosines, sines = read(cos, "Cos", axis), read(sin, "Sin", axis)
    return Rotation(x, (cosines, sines), int(by_pairs), axis) if cosines and sines else None


def rotate_half(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is Concat(-second half of x, first half of x) along the last axis."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or not is_last_axis(concat, attribute(concat, "axis")):
        return None
    negated = producer(concat.inputs[0], "Neg")
    second, first = part_of(negated.inputs[0] if negated else None), part_of(concat.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    size = size_of(first[0])
    return first[0] if (first[1:], second[1:]) == ((0, size // 2), (size // 2, size)) else None


def waves_by_halves(value: ir.Value | None, function: str, axis: int = 1) -> Waves | None:
    """function(Concat(f, f)) [B, S, RD], perhaps scaled, or Concat(f, f), under the Unsqueeze that lets it meet the
    heads; its half."""
    value = root = unsqueezed(value, axis)
    scaled = producer(value, "Mul")
    if scaled is not None and number(scaled.inputs[1]) is not None:
        value = scaled.inputs[0]
    wave = producer(value, function)
    angles = producer(wave.inputs[0] if wave is not None else value, "Concat")
    if root is None or angles is None or len(angles.inputs) != 2 or angles.inputs[0] is not angles.inputs[1]:
        return None
    if not is_last_axis(angles, attribute(angles, "axis")):
        return None
    return root, lambda before: first_part(before, root, size_of(root) // 2)


def fuse_halves(model: ir.Model) -> int:
    """Form rotary embeddings where two halves are turned apart from each other, as in gpt-oss."""
    n_rewrites = 0
    for node in list(model.graph):
        found = turned_halves(node) if node.op_type == "Concat" and len(node.inputs) == 2 else None
        if found is None:
            continue
        x, *waves = found
        axis = heads_axis(x)
        replace(node.outputs[0], turn(node, x, waves, axis, {"num_heads": dims(x)[axis], "interleaved": 0}))
        n_rewrites += 1
    return n_rewrites


def turned_halves(concat: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x, its cosines and its sines [B, S, RD/2]."""
    found = turned_parts(*concat.inputs)
    if found is None or not is_last_axis(concat, attribute(concat, "axis")):
        return None
    a, b, cos, sin = found
    split = producer(a, "Split")
    if split is None or list(split.outputs) != [a, b] or not is_last_axis(split, attribute(split, "axis", 0)):
        return None
    x, n = split.inputs[0], size_of(a)
    if x is None or len(dims(x)) != 4 or dims(a) != dims(b) or (size_of(cos), size_of(sin)) != (n, n):
        return None
    return x, cos, sin


def fuse_pairs(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        in_place = node.op_type == "Reshape"
        if node.op_type == "Concat" and len(node.inputs) == 2 and is_last_axis(node, attribute(node, "axis")):
            match = turned_pairs(*node.inputs)
        else:
            match = pairs_in_place(node) if in_place else None
        if match is None:
            continue
        x = before_reshapes(match.x) if in_place else emit(node, "Concat", match.halves, axis=-1)[0]
        axis = heads_axis(x)
        settings = {"num_heads": dims(x)[axis], "interleaved": int(in_place)}
        replace(node.outputs[0], turn(node, x, [match.cos, match.sin], axis, settings))
        n_rewrites += 1
    return n_rewrites


def before_reshapes(value: ir.Value) -> ir.Value:
    """The value from which one of the same shape was made by reshapes alone."""
    source, node = value, producer(value, "Reshape")
    while node is not None and node.inputs[0] is not None:
        source = node.inputs[0]
        node = producer(source, "Reshape")
        if dims(source) == dims(value):
            return source
    return value


def fuse_partial(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Concat" or len(node.inputs) != 2 or not is_last_axis(node, attribute(node, "axis")):
            continue
        rotary, axis = producer(node.inputs[0], "RotaryEmbedding"), 1
        if rotary is None:
            rotary, axis = producer(swapped(node.inputs[0]), "RotaryEmbedding"), 2
        part = rotary.inputs[0] if rotary else None
        turned, rest = part_of(part if axis == 1 else swapped(part)), part_of(node.inputs[1])
        if rotary is None or turned is None or rest is None or turned[0] is not rest[0]:
            continue
        x, start, stop = turned
        if attribute(rotary, "rotary_embedding_dim", 0) or (start, rest[1:]) != (0, (stop, size_of(x))):
            continue
        settings = {name: attribute(rotary, name) for name in ("num_heads", "interleaved") if name in rotary.attributes}
        settings |= {"rotary_embedding_dim": stop - start}
        replace(node.outputs[0], turn(node, x, rotary.inputs[1:3], axis, settings))
        n_rewrites += 1
    return n_rewrites


def swapped(value: ir.Value | None) -> ir.Value | None:
    """The value before its axes 1 and 2 changed places."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and list(attribute(node, "perm") or ()) == SWAPPED else None

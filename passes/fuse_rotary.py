"""Recognise rotary embedding where it is spelled out, or applied to a part of each head.

rewrite:
    Add(Mul(x, C), Mul(Concat(Neg(x[…, RD/2:]), x[…, :RD/2]), S))        C = Cos(Concat(f, f)), S = Sin(Concat(f, f))
    -->
    RotaryEmbedding(x, C[…, :RD/2], S[…, :RD/2])

    Concat(RotaryEmbedding(x[…, :r], cos, sin), x[…, r:])
    -->
    RotaryEmbedding(x, cos, sin, rotary_embedding_dim=r)
refuses: halves cut elsewhere than in the middle or on another axis; a C or S whose halves are not the same by
construction; heads that are not [batch, heads, sequence, D].
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, ints_constant, is_last_axis, number, producer, replace
from llmc.compiler.graph_shapes import dims, ints


def fuse_rotary(model: ir.Model) -> int:
    """Assumes the exported graph; leaves standard RotaryEmbedding nodes. Returns the number of rewrites."""
    return fuse_spelled_out(model) + fuse_partial(model)


def fuse_spelled_out(model: ir.Model) -> int:
    n_rewrites = 0
    halves: dict[ir.Value, ir.Value] = {}  # one of each, since attention must see that q and k are turned alike
    for node in list(model.graph):
        match = spelled_out(node) if node.op_type == "Add" else None
        if match is None:
            continue
        x, *angles = match
        for whole in angles:
            if whole not in halves:
                halves[whole] = first_half(node, whole, last(x) // 2)
        operands = [x, *(halves[whole] for whole in angles)]
        result = emit(node, "RotaryEmbedding", operands, num_heads=dims(x)[1], interleaved=0)
        replace(node.outputs[0], result[0])
        n_rewrites += 1
    return n_rewrites


def spelled_out(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x [B, H, S, RD] and its cosines and sines [B, S, RD], whose halves are equal."""
    straight, turned = (producer(value, "Mul") for value in add.inputs)
    if straight is None or turned is None:
        return None
    for a, b in ((straight, turned), (turned, straight)):
        for x, cos in (a.inputs, reversed(a.inputs)):
            for y, sin in (b.inputs, reversed(b.inputs)):
                angles = doubled(cos, "Cos"), doubled(sin, "Sin")
                if x is not None and rotate_half(y) is x and len(dims(x)) == 4 and angles[0] and angles[1]:
                    return x, angles[0], angles[1]
    return None


def rotate_half(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is Concat(-second half of x, first half of x) along the last axis."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or not is_last_axis(concat, attribute(concat, "axis")):
        return None
    negated = producer(concat.inputs[0], "Neg")
    second, first = part_of(negated.inputs[0] if negated else None), part_of(concat.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    size = last(first[0])
    return first[0] if (first[1:], second[1:]) == ((0, size // 2), (size // 2, size)) else None


def part_of(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """x, start and stop, if the value is x[…, start:stop]."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is None or any(constant(operand) is None for operand in node.inputs[1:]):
        return None
    starts, ends, axes = (ints(operand) for operand in node.inputs[1:4])
    steps = ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if steps != [1] or not axes or len(axes) != 1 or not is_last_axis(node, axes[0]) or not starts or not ends:
        return None
    x = node.inputs[0]
    start, stop, _ = slice(starts[0], ends[0]).indices(last(x))
    return x, start, stop


def doubled(value: ir.Value | None, function: str) -> ir.Value | None:
    """function(Concat(f, f)) [B, S, RD], perhaps scaled, under the Unsqueeze that lets it meet the heads."""
    unsqueeze = producer(value, "Unsqueeze")
    if unsqueeze is None or ints(unsqueeze.inputs[1]) != [1]:
        return None
    value = root = unsqueeze.inputs[0]
    scaled = producer(value, "Mul")
    if scaled is not None and number(scaled.inputs[1]) is not None:
        value = scaled.inputs[0]
    wave = producer(value, function)
    angles = producer(wave.inputs[0], "Concat") if wave is not None else None
    if angles is None or len(angles.inputs) != 2 or not is_last_axis(angles, attribute(angles, "axis")):
        return None
    return root if angles.inputs[0] is angles.inputs[1] else None


def first_half(before: ir.Node, value: ir.Value, half: int) -> ir.Value:
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    bounds = [ints_constant(graph, [number]) for number in (0, half, len(dims(value)) - 1, 1)]
    return emit(before, "Slice", [value, *bounds])[0]


def last(value: ir.Value) -> int:
    size = dims(value)[-1]
    assert isinstance(size, int)
    return size


def fuse_partial(model: ir.Model) -> int:
    n_rewrites = 0
    for node in list(model.graph):
        if node.op_type != "Concat" or len(node.inputs) != 2 or not is_last_axis(node, attribute(node, "axis")):
            continue
        rotary = producer(node.inputs[0], "RotaryEmbedding")
        turned, rest = part_of(rotary.inputs[0] if rotary else None), part_of(node.inputs[1])
        if rotary is None or turned is None or rest is None or turned[0] is not rest[0]:
            continue
        x, start, stop = turned
        if attribute(rotary, "rotary_embedding_dim", 0) or (start, rest[1:]) != (0, (stop, last(x))):
            continue
        settings = {name: attribute(rotary, name) for name in ("num_heads", "interleaved") if name in rotary.attributes}
        result = emit(node, "RotaryEmbedding", [x, *rotary.inputs[1:3]], rotary_embedding_dim=stop - start, **settings)
        replace(node.outputs[0], result[0])
        n_rewrites += 1
    return n_rewrites

"""Turn the graph of a picture's N patches into one of rows: what has heads in an axis of their own loses it.

rewrite:
    Reshape(Conv(Reshape(x [N, K], [N, C, …]), W [E, C, …], b), [N, E])              one patch each
    -->
    llmc.LinearBias(x, W [E, K], b)                                                  without b: llmc.Linear

    Squeeze(Slice(Transpose(Reshape(x [N, n·W], [N, n, H, D]), [1, 0, 2, 3]), i, i + 1, axis 0))
    -->
    Reshape(Slice(x, i·W, (i + 1)·W, axis 1), [N, H, D])

    Add(Mul(x, C), Mul(Concat(Neg(x[…, D/2:]), x[…, :D/2]), S))                      x [N, H, D], C, S [N, 1, D],
    -->                                                                              each half twice
    Reshape(llmc.Rotary(Reshape(x, [N, H·D]), C[…, :D/2], S[…, :D/2]), [N, H, D])

    Reshape(Transpose(Attention(Unsqueeze(Transpose(q [N, H, D])), …)), [N, H·D])
    -->
    llmc.BidirectionalAttention(Reshape(q, [N, H·D]), …)

    Split(x), of one part
    -->
    x
refuses: attention that is causal or masked, or is of anything else than all patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, emit, ints_constant, producer, replace, weight_of
from llmc.compiler.graph.shapes import dims, ints
from llmc.compiler.ops import DOMAIN
from llmc.passes.flatten_tile import both_ways, shaped
from llmc.passes.fuse_rotary import rotate_half, waves_by_halves
from llmc.passes.interleaved_rotary import Waves
from llmc.runtime.errors import LlmcError

HEADS_FIRST, HEADS_LAST, PARTS_FIRST = [1, 0, 2], [0, 2, 1, 3], [1, 0, 2, 3]


def flatten_patches(model: ir.Model) -> int:
    """Assumes `pixels` [N, K] and numbers for shapes.  Leaves the input `positions` [N] too, where patches attend.
    Returns the number of rewrites."""
    graph = model.graph
    n_rewrites = 0
    angles: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.graph is None:  # a rewrite has done away with it
            continue
        old, new = node.outputs[0], None
        if node.op_type == "Reshape":
            new = of_patches(node)
        elif node.op_type == "Split" and len(node.outputs) == 1:
            new = node.inputs[0]
        elif node.op_type == "Squeeze":
            new = part_of_columns(node)
        elif node.op_type == "Add":
            new = turned(node, angles)
        elif node.op_type == "Attention":
            old, new = attended(node)
        if new is not None:
            replace(old, new)
            n_rewrites += 1
    if any(node.op_type == "BidirectionalAttention" for node in graph) and len(graph.inputs) and not told(graph):
        n = dims(graph.inputs[0])[0]
        graph.inputs.append(ir.Value(name="positions", shape=ir.Shape([n]), type=ir.TensorType(ir.DataType.INT64)))
    return n_rewrites


def told(graph: ir.Graph) -> bool:
    return any(value.name == "positions" for value in graph.inputs)


def reshaped(before: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The value in this shape; of reshapes in a row the last one counts."""
    while (source := producer(value, "Reshape")) is not None and source.inputs[0] is not None:
        value = source.inputs[0]
    if dims(value) == tuple(shape):
        return value
    assert isinstance(before.graph, ir.Graph)
    return emit(before, "Reshape", [value, ints_constant(before.graph, shape)])[0]


def sizes(value: ir.Value | None) -> list[int]:
    return [size for size in dims(value) if isinstance(size, int)]


def of_patches(node: ir.Node) -> ir.Value | None:
    """A convolution each of whose pictures is one patch, as a product."""
    conv = producer(node.inputs[0], "Conv")
    kernel = weight_of(conv.inputs[1]) if conv is not None else None
    if conv is None or kernel is None:
        return None
    n, *rest = sizes(conv.outputs[0])
    places, (n_made, *patch) = rest[1:], kernel.dims
    x, bias = conv.inputs[0], conv.inputs[2] if len(conv.inputs) > 2 else None
    if x is None or sizes(node.outputs[0]) != [n, n_made] or prod(places) != 1 or sizes(x) != [n, *patch]:
        return None
    if attribute(conv, "group", 1) != 1 or any(attribute(conv, "pads") or ()):
        return None
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    flat = add_constant(graph, shaped(kernel, (n_made, prod(patch))), f"{kernel.name}.flat")
    rows = reshaped(node, x, [n, prod(patch)])
    operands = [rows, flat, *([] if bias is None else [bias])]
    return emit(node, f"{DOMAIN}.{'Linear' if bias is None else 'LinearBias'}", operands)[0]


def part_of_columns(node: ir.Node) -> ir.Value | None:
    """One of the parts, queries say, that a product makes side by side."""
    cut = producer(node.inputs[0], "Slice")
    moved = producer(cut.inputs[0] if cut else None, "Transpose")
    parts = moved.inputs[0] if moved is not None else None
    made = producer(parts, "Reshape")
    if cut is None or moved is None or made is None or list(attribute(moved, "perm")) != PARTS_FIRST:
        return None
    if any(constant(value) is None for value in cut.inputs[1:]):
        return None
    (starts, ends, axes), shape = (ints(value) for value in cut.inputs[1:4]), sizes(parts)
    x = made.inputs[0]
    n, _, *rest = shape
    if x is None or sizes(x) != [n, prod(shape[1:])] or axes != [0] or not starts or ends != [starts[0] + 1]:
        return None
    graph, width = node.graph, prod(rest)
    assert isinstance(graph, ir.Graph)
    bounds = [ints_constant(graph, [number]) for number in (starts[0] * width, ends[0] * width, 1, 1)]
    return reshaped(node, emit(node, "Slice", [x, *bounds])[0], [n, *rest])


def turned(add: ir.Node, angles: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """Heads that are turned.  angles: halves of cosines and sines so far, by what they were found in: queries and keys
    are seen to be turned alike where they have the same."""
    products = [producer(value, "Mul") for value in add.inputs]
    if None in products or len(dims(add.outputs[0])) != 3:
        return None
    for a, b in (products, products[::-1]):
        assert a is not None
        assert b is not None
        for x, cos in (a.inputs, a.inputs[::-1]):
            for y, sin in (b.inputs, b.inputs[::-1]):
                if x is None or rotate_half(y) is not x:
                    continue
                waves = waves_of(cos, "Cos"), waves_of(sin, "Sin")
                if waves[0] is None or waves[1] is None:
                    continue
                for root, make in (waves[0], waves[1]):
                    if root not in angles:
                        angles[root] = make(add)
                n, heads, size = sizes(x)
                operands = [reshaped(add, x, [n, heads * size]), *(angles[wave[0]] for wave in waves if wave)]
                rotary = emit(add, f"{DOMAIN}.Rotary", operands, num_heads=heads, rotary_dim=size, interleaved=0)
                return reshaped(add, rotary[0], [n, heads, size])
    return None


def waves_of(value: ir.Value | None, function: str) -> Waves | None:
    """Cosines or sines [N, 1, D] whose halves are the same, counted from either end."""
    return waves_by_halves(value, function, 1) or waves_by_halves(value, function, -2)


def attended(node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """What is made of an attention's result, and what takes its place.  q [1, H, N, D], k, v [1, KH, N, D]."""
    q, k, v, *more = node.inputs
    if any(more) or attribute(node, "is_causal", 0):
        raise refusal(node, "is causal, or has a mask or a cache")
    heads = [before_attention(value) for value in (q, k, v)]
    shapes = [sizes(value) for value in heads if value is not None]
    after = next((use.node for use in node.outputs[0].uses()), None)
    rows = next((use.node for use in after.outputs[0].uses()), None) if after is not None else None
    if len(shapes) < 3 or len({shape[0] for shape in shapes}) > 1 or rows is None or after is None:
        raise refusal(node, "is of something else than all patches")
    (n, n_heads, size), (_, kv_heads, _), (_, _, value_size) = shapes
    if rows.op_type != "Reshape" or list(attribute(after, "perm", ())) != HEADS_LAST:
        raise refusal(node, "is read by something else than a product")
    if sizes(rows.outputs[0]) != [n, n_heads * value_size]:
        raise refusal(node, "is read by something else than a product")
    flat = [reshaped(node, value, [n, prod(sizes(value)[1:])]) for value in heads if value is not None]
    return rows.outputs[0], both_ways(node, flat, n_heads, kv_heads, size)


def before_attention(value: ir.Value | None) -> ir.Value | None:
    """x [N, H, D] of [1, H, N, D]."""
    added = producer(value, "Unsqueeze")
    moved = producer(added.inputs[0] if added is not None else None, "Transpose")
    fits = moved is not None and list(attribute(moved, "perm")) == HEADS_FIRST
    return moved.inputs[0] if moved is not None and fits and dims(value)[0] == 1 else None


def refusal(node: ir.Node, why: str) -> LlmcError:
    return LlmcError(f"flatten_patches: {node.op_type} {why}", place=f"node {node.name}")

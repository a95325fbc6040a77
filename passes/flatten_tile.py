"""Turn the graph of one tile of a picture, all of whose shapes are known, into one over rows.

rewrite:
    Transpose(Reshape(Conv(x [1,C,H,W], K [N,C,p,q]), [1,N,n]), [0,2,1])      one patch beside the other
    -->
    llmc.Linear(patches of x [n, C·p·q], K [N, C·p·q])                        [n, N]

    Transpose(Attention(Transpose(Reshape(q, [1,n,H,D])), …))                 q [1, n, H·D]
    -->
    llmc.BidirectionalAttention(q, k, v)                                      q [n, H·D]

    Add(x [1,n,K], w [1,n,K])
    -->
    Add(x [n,K], w [n,K])                                                     likewise of others that keep rows apart

    Attention(q [1,H,n,D], k [1,H,m,D], v [1,H,m,D])                          rows that attend others: n is not m
    -->
    MatMul(Softmax(MatMul(Mul(q, scale), Transpose(k))), v)
refuses: attention that is causal or masked, or over different numbers of rows, each their own.

Every value loses the first of its axes, if that has one element and at least two others follow; what turned rows and
columns to and fro (Transpose, Reshape) goes.  An operator that is not known here is left as it is, with its operands
reshaped to what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, emit, ints_constant, producer, prune, weight_of
from llmc.compiler.graph.shapes import BROADCAST, SAME_AS_FIRST, attributes_of, dims, infer_missing, ints
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import DOMAIN
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

FLAT = "llmc.flat_tile"
"""In a graph's metadata: this was done."""
NORMS = ("LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax")
RESHAPES = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def flatten_tile(model: ir.Model) -> int:
    """Assumes the input `pixels` and numbers for shapes. Leaves the input `positions` [n] too, where patches attend.
    Returns the number of nodes rewritten."""
    graph = model.graph
    if [value.name for value in graph.inputs] != ["pixels"] or FLAT in model.metadata_props:
        return 0
    model.metadata_props[FLAT] = "yes"
    infer_missing(graph)
    old_nodes = list(graph)
    tile = Tile(graph)
    for node in old_nodes:
        rule = RULES.get(op_name(node), anything)
        for old, new in zip(node.outputs, rule(tile, node), strict=True):
            tile.new[old] = new
    tile.finish()
    return len(old_nodes)


def rows_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value without the axis that counts tiles."""
    shape = tuple(size for size in dims(value) if isinstance(size, int))
    return shape[1:] if len(shape) > 2 and shape[0] == 1 and not value.is_graph_input() else shape


class Tile:
    """The values of the old graph and what became of them, each of the shape that `rows_of` says."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.new: dict[ir.Value, ir.Value] = {}
        self.n_rows: set[int] = set()

    def take(self, value: ir.Value | None) -> ir.Value | None:
        return None if value is None else self.new.get(value, value)

    def take_rows(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The same, where a constant has to be of the shape that `rows_of` says too."""
        return self.new[value] if value in self.new else self.reshape(node, value, rows_of(value))

    def finish(self) -> None:
        """Swap results, and drop the old nodes."""
        graph = self.graph
        for index, old in enumerate(list(graph.outputs)):
            new = self.new[old]
            if new.is_graph_input():
                raise LlmcError("flatten_tile: the tower gives its pixels back")
            new.name, old.name = old.name, None
            graph.outputs[index] = new
        if len(self.n_rows) > 1:
            raise LlmcError(f"flatten_tile: attention over different numbers of rows, {sorted(self.n_rows)}")
        for n_rows in self.n_rows:
            positions = ir.Value(name="positions", shape=ir.Shape([n_rows]), type=ir.TensorType(ir.DataType.INT64))
            graph.inputs.append(positions)
        prune(reversed(graph))

    # -- what rules are made of ------------------------------------------------------------------------------------

    def refusal(self, node: ir.Node, why: str) -> LlmcError:
        return LlmcError(f"flatten_tile: {node.op_type} {why}", place=f"node {node.name}")

    def reshape(self, node: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The value in this shape; reshapes in a row become one, or none, and a weight is read in another shape."""
        while (source := producer(value, "Reshape")) is not None and source.inputs[0] is not None:
            value = source.inputs[0]
        if dims(value) == tuple(shape):
            return value
        if (weight := weight_of(value)) is not None:
            return add_constant(self.graph, shaped(weight, tuple(shape)), f"{weight.name}.flat")
        return emit(node, "Reshape", [value, ints_constant(self.graph, shape)])[0]

    def transpose(self, node: ir.Node, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """The value with its axes in this order; two in a row become one, or none."""
        before = producer(value, "Transpose")
        if before is not None and before.inputs[0] is not None:
            inner = attribute(before, "perm")
            value, perm = before.inputs[0], [inner[axis] for axis in perm]
        if list(perm) == sorted(perm):
            return value
        return emit(node, "Transpose", [value], perm=list(perm))[0]


Rule = Callable[[Tile, ir.Node], "list[ir.Value]"]


def anything(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """The operator as it is, between reshapes."""
    inputs = [
        tile.reshape(node, tile.new[value], as_it_was(value)) if value in tile.new else value for value in node.inputs
    ]
    same = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
    for old, new in zip(node.outputs, same.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, same)
    return [tile.reshape(node, new, rows_of(old)) for old, new in zip(node.outputs, same.outputs, strict=True)]


def as_it_was(value: ir.Value | None) -> list[int]:
    return [size for size in dims(value) if isinstance(size, int)]


def elementwise(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Operands meet from behind; of constants the axes of 1 that then stand in front are cut off."""
    rank = len(rows_of(node.outputs[0]))
    operands = [tile.take(value) for value in node.inputs]
    for index, value in enumerate(operands):
        if value is not None and constant(value) is not None and len(dims(value)) > rank:
            operands[index] = without_ones(tile.graph, value, rank)
    return emit(node, op_name(node), operands, like=node, **attributes_of(node))


def without_ones(graph: ir.Graph, value: ir.Value, rank: int) -> ir.Value:
    """A constant [1, …, 1, its last axes] without the axes in front."""
    weight, tensor = weight_of(value), constant(value)
    shape = tuple(size for size in dims(value)[len(dims(value)) - rank :] if isinstance(size, int))
    if weight is not None:
        return add_constant(graph, shaped(weight, shape), f"{weight.name}.flat")
    assert tensor is not None
    return add_constant(graph, tensor.numpy().reshape(shape), f"{value.name}.flat")


def shaped(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """The same elements in another shape."""
    made_of = ("flat", shape, weight)
    return Weight.computed(
        f"{weight.name}.flat", shape, lambda: weight.unrounded().reshape(shape), weight.stored_dtype, made_of
    )


def norm(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Along the last axis, which stays the last."""
    if attribute(node, "axis", -1) not in (-1, len(dims(node.inputs[0])) - 1):
        return anything(tile, node)
    inputs = [tile.take(value) for value in node.inputs]
    return emit(node, op_name(node), inputs, **attributes_of(node) | {"axis": -1})


def reshape(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Reshape and its kin; columns that become a picture, or the other way round, stay where they are."""
    x, y = tile.take(node.inputs[0]), node.outputs[0]
    assert x is not None
    wanted, turned = rows_of(y), producer(x, "Transpose")
    if turned is not None and turned.inputs[0] is not None and len(wanted) == 2:
        before, perm = turned.inputs[0], attribute(turned, "perm")
        if list(perm) == [len(perm) - 1, *range(len(perm) - 1)] and dims(x)[0] == wanted[0]:
            rows = tile.reshape(node, before, [prod(wanted[1:]), wanted[0]])
            return [tile.transpose(node, rows, [1, 0])]
    return [tile.reshape(node, x, wanted)]


def transpose(tile: Tile, node: ir.Node) -> list[ir.Value]:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    perm = list(attribute(node, "perm") or reversed(range(len(dims(x)))))
    n_cut = len(dims(x)) - len(rows_of(x))
    if x not in tile.new or (n_cut and perm[0] != 0):
        return anything(tile, node)
    value = tile.take(x)
    assert value is not None
    value = tile.transpose(node, value, [axis - n_cut for axis in perm[n_cut:]])
    return [value if dims(value) == rows_of(y) else tile.reshape(node, value, rows_of(y))]


def along_one_axis(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Concat, Split: the axis gets its new number."""
    rank = len(dims(node.outputs[0]))
    axis = attribute(node, "axis", 0) % rank
    varying = [value for value in node.inputs if value in tile.new]
    if node.op_type == "Split":
        varying = varying[:1]
        if len(node.outputs) == 1:
            return [tile.new[value] for value in varying if value is not None]
    cut = {rank - len(rows_of(value)) for value in (*node.outputs, *varying) if value is not None}
    if len(cut) > 1 or axis < max(cut):
        return anything(tile, node)
    n_cut = cut.pop()
    inputs = [tile.take(value) for value in node.inputs]
    if node.op_type == "Concat":
        inputs = [
            without_ones(tile.graph, value, rank - n_cut) if value is not None and constant(value) else value
            for value in inputs
        ]
    attributes = attributes_of(node) | {"axis": axis - n_cut}
    return emit(node, node.op_type, inputs, n_results=len(node.outputs), **attributes)


def slice_(tile: Tile, node: ir.Node) -> list[ir.Value]:
    x, starts, ends, *rest = node.inputs
    value = tile.take(x)
    assert x is not None
    assert value is not None
    steps = ints(rest[1]) if len(rest) > 1 else None
    if dims(x) == dims(node.outputs[0]) and all(step == 1 for step in steps or ()):
        return [value]
    n_cut = len(dims(x)) - len(rows_of(x))
    axes = [axis % len(dims(x)) for axis in ints(rest[0]) or ()] if rest else list(range(len(ints(starts) or ())))
    if x not in tile.new or any(axis < n_cut for axis in axes) or len(dims(x)) - n_cut != len(rows_of(node.outputs[0])):
        return anything(tile, node)
    moved = ints_constant(tile.graph, [axis - n_cut for axis in axes])
    return emit(node, "Slice", [value, starts, ends, moved, *rest[1:]])


def product(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Rows times a matrix; what has more than two axes is brought to rows before, and back behind it."""
    x, matrix, *rest = (tile.take(value) for value in node.inputs)
    if x is None or matrix is None or is_varying(matrix) or len(dims(matrix)) != 2 or attribute(node, "transA", 0):
        return anything(tile, node)
    shape = as_it_was(x)
    rows = tile.reshape(node, x, [prod(shape[:-1]), shape[-1]])
    (y,) = emit(node, node.op_type, [rows, matrix, *rest], **attributes_of(node))
    return [tile.reshape(node, y, rows_of(node.outputs[0]))]


def is_varying(value: ir.Value) -> bool:
    """Whether it is neither a constant nor a turned one."""
    turned = producer(value, "Transpose")
    return constant(value) is None and (turned is None or constant(turned.inputs[0]) is None)


def convolution(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Of patches side by side: a product with each patch as a row."""
    x, kernel, *bias = node.inputs
    value, weight = tile.take(x), weight_of(kernel)
    strides = attribute(node, "strides")
    if value is None or weight is None or len(weight.dims) != 4 or attribute(node, "group", 1) != 1:
        return anything(tile, node)
    n, channels, *patch = weight.dims
    sizes = list(rows_of(node.outputs[0]))
    plain = all(size == 1 for size in attribute(node, "dilations") or ()) and not any(attribute(node, "pads") or ())
    plain = plain and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    if list(strides or ()) != patch or not plain or len(sizes) != 3 or len(dims(value)) != 3:
        return anything(tile, node)
    whole = [channels, *(size * step for size, step in zip(sizes[1:], patch, strict=True))]
    if as_it_was(value) != whole:  # a border that makes no patch
        ends, axes = ints_constant(tile.graph, whole[1:]), ints_constant(tile.graph, [1, 2])
        value = emit(node, "Slice", [value, ints_constant(tile.graph, [0, 0]), ends, axes])[0]
    parts = tile.reshape(node, value, [channels, sizes[1], patch[0], sizes[2], patch[1]])
    together = emit(node, "Transpose", [parts], perm=[1, 3, 0, 2, 4])[0]
    rows = tile.reshape(node, together, [sizes[1] * sizes[2], channels * prod(patch)])
    flat = add_constant(tile.graph, shaped(weight, (n, channels * prod(patch))), f"{weight.name}.flat")
    operands = [rows, flat, *bias]
    (y,) = emit(node, f"{DOMAIN}.LinearBias" if any(bias) else f"{DOMAIN}.Linear", operands[: 2 + any(bias)])
    return [tile.reshape(node, tile.transpose(node, y, [1, 0]), sizes)]


def both_ways(node: ir.Node, rows: Sequence[ir.Value], heads: int, kv_heads: int, head_dim: int) -> ir.Value:
    """Attention [n, H·D] in place of the node, of rows of queries, keys and values."""
    return emit(
        node,
        f"{DOMAIN}.BidirectionalAttention",
        rows,
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=float(attribute(node, "scale", head_dim**-0.5)),
        softcap=float(attribute(node, "softcap", 0.0)),
        window=0,
        layer=int(node.metadata_props.get("llmc.layer") or 0),
    )[0]


def attention(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """q [H, n, D], k, v [KH, n, D] become [n, H·D], [n, KH·D]."""
    q, k, v, *more = node.inputs
    shapes = [as_it_was(value) for value in (q, k, v)]
    if any(more) or attribute(node, "is_causal", 0):
        raise tile.refusal(node, "is causal, or has a mask or a cache")
    if any(len(shape) != 4 or shape[0] != 1 for shape in shapes) or shapes[1][:3] != shapes[2][:3]:
        raise tile.refusal(node, f"has operands of the shapes {shapes}")
    (_, heads, n_rows, head_dim), (_, kv_heads, n_keys, key_dim), (*_, value_dim) = shapes
    if head_dim != key_dim or heads % kv_heads:
        raise tile.refusal(node, f"has operands of the shapes {shapes}")
    if n_rows != n_keys:
        return across(tile, node)
    self_attended = []
    for value, (_, n_heads, _, size) in zip((q, k, v), shapes, strict=True):
        assert value is not None
        rows = tile.transpose(node, tile.take_rows(node, value), [1, 0, 2])
        self_attended.append(tile.reshape(node, rows, [n_rows, n_heads * size]))
    tile.n_rows.add(n_rows)
    result = both_ways(node, self_attended, heads, kv_heads, head_dim)
    return [tile.transpose(node, tile.reshape(node, result, [n_rows, heads, value_dim]), [1, 0, 2])]


def across(tile: Tile, node: ir.Node) -> list[ir.Value]:
    """Attention of some rows over others, written out: softmax(scale q kᵀ) v, q [H, n, D], k, v [KH, m, D]."""
    q, k, v = (tile.take_rows(node, value) for value in node.inputs[:3] if value is not None)
    heads, n_rows, size = as_it_was(q)
    n_groups = as_it_was(k)[0]
    if attribute(node, "softcap", 0.0):
        raise tile.refusal(node, "has a softcap")
    together = tile.reshape(node, q, [n_groups, heads // n_groups * n_rows, size])  # heads that share keys are rows
    turned = emit(node, "Transpose", [k], perm=[0, 2, 1])[0]
    scale = np.array(attribute(node, "scale", size**-0.5), np.float32)
    scaled = emit(node, "Mul", [together, add_constant(tile.graph, scale, f"scale.{scale}")])[0]
    shares = emit(node, "Softmax", emit(node, "MatMul", [scaled, turned]), axis=-1)[0]
    return [tile.reshape(node, emit(node, "MatMul", [shares, v])[0], rows_of(node.outputs[0]))]


RULES: dict[str, Rule] = {
    **dict.fromkeys((SAME_AS_FIRST | BROADCAST) - {"Identity", "RotaryEmbedding", "Trilu", *NORMS}, elementwise),
    **dict.fromkeys(NORMS, norm),
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(("Gemm", "MatMul"), product),
    **dict.fromkeys(("Concat", "Split"), along_one_axis),
    "Attention": attention,
    "Conv": convolution,
    "Slice": slice_,
    "Transpose": transpose,
}

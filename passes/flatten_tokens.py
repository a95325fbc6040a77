"""Turn a graph over [batch, sequence] into one over M tokens.

rewrite:
    Transpose(Attention(Transpose(Reshape(q, [B,S,H,D])), …))           q [batch, sequence, H·D]
    -->
    llmc.CausalAttention(q, k, v)                                        q [M, H·D]

    the same of llmc.SinkAttention(…, sinks): llmc.SinkCausalAttention(q, k, v, sinks); likewise llmc.AlibiAttention;
    of an Attention that is not causal: llmc.BidirectionalAttention(q, k, v); likewise llmc.DistanceAttention
refuses: an operator that mixes tokens and is not Attention; one whose meaning without the batch axis is not known here.

Every value that has the axes batch and sequence loses them and gets M as its first axis, wherever they were; what moved
them about (Transpose, Reshape) goes. The graph then means one sequence of M tokens, the batch of 1: attention, the only
operator through which tokens see each other, says so by its name, until `insert_kv_cache` gives each token a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, ints_constant, producer, prune, weight_of
from llmc.compiler.graph.shapes import BROADCAST, REDUCTIONS, SAME_AS_FIRST, attributes_of, dims, infer_missing, ints
from llmc.compiler.graph.text import op_name
from llmc.compiler.ops import CLAMPED_EXPERTS, DEEPENED, DOMAIN, EMBEDDED, EXPERTS, GATHER_TURNED, POOLS, WITH_STATES
from llmc.compiler.ops.define import Dim
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

INPUTS = ("input_ids", "position_ids", "turns")
M = ir.SymbolicDim("M")
FLAT = ({"batch", "sequence"}, {"batch*sequence"}, {"sequence*batch"})


def flatten_tokens(model: ir.Model) -> int:
    """Assumes inputs `input_ids` and `position_ids` [batch, sequence], perhaps `turns` [batch, sequence, 3]. Leaves
    inputs `tokens` and `positions` [M], perhaps `turns` [M, 3], and values of first axis M. Returns the number of nodes
    rewritten."""
    graph = model.graph
    if tuple(value.name for value in graph.inputs) not in (INPUTS[:2], INPUTS):
        return 0
    infer_missing(graph)
    flattening = Flattening(graph)
    old_nodes = [node for node in graph if any(token_axes(value) for value in node.outputs)]
    for node in old_nodes:
        flattening.rewrite(node)
    flattening.finish()
    return len(old_nodes)


def token_axes(value: ir.Value | None) -> tuple[int, ...]:
    """The axes that count tokens: two of them, one that is their product, or none."""
    if value is None or value.shape is None:
        return ()
    axes = tuple(i for i, size in enumerate(value.shape) if not isinstance(size, int))
    names = {str(value.shape[i]) for i in axes}
    if axes and (names not in FLAT or len(names) != len(axes)):
        node = value.producer()
        made = f"{node.op_type} gives" if node is not None else "an input has"
        raise LlmcError(
            f"flatten_tokens: {made} the shape {value.shape}, not one over tokens", place=f"value {value.name}"
        )
    return axes


def other_axes(value: ir.Value) -> list[int]:
    tokens = token_axes(value)
    return [axis for axis in range(len(dims(value))) if axis not in tokens]


def between(value: ir.Value) -> list[int]:
    """The other axes in front of the last that counts tokens."""
    return [axis for axis in other_axes(value) if axis < max(token_axes(value), default=0)]


class Flattening:
    """The values of the old graph and what became of them, each [M, its other axes in order]."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.new: dict[ir.Value, ir.Value] = {}
        for old, name in zip(graph.inputs, ("tokens", "positions", "turns"), strict=False):
            shape = ir.Shape([M, *dims(old)[2:]])
            self.new[old] = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT64))

    def rewrite(self, node: ir.Node) -> None:
        rule = RULES.get(op_name(node))
        if rule is None:
            raise self.refusal(node, "is not known to keep tokens apart")
        results = rule(self, node)
        for old, new in zip(node.outputs, results, strict=True):
            if len(dims(new)) != 1 + len(other_axes(old)):
                raise self.refusal(node, f"has the shape {old.shape}")
            self.new[old] = new

    def finish(self) -> None:
        """Swap inputs and results, and drop the old nodes with their shape arithmetic."""
        graph = self.graph
        outputs = [self.new[value] for value in graph.outputs]
        for old, new in zip(graph.outputs, outputs, strict=True):
            new.name, old.name = old.name, None
        graph.outputs[:] = outputs
        inputs = [self.new[value] for value in graph.inputs]
        prune(reversed(graph))
        graph.inputs[:] = inputs

    # -- what rules are made of ------------------------------------------------------------------------------------

    def refusal(self, node: ir.Node, why: str) -> LlmcError:
        return LlmcError(f"flatten_tokens: {node.op_type} {why}", place=f"node {node.name}")

    def emit(self, node: ir.Node, op: str, inputs: list[ir.Value | None], **attributes: Any) -> list[ir.Value]:
        """A node in the place of the old one, with as many results."""
        return emit(node, op, inputs, n_results=len(node.outputs), like=node, **attributes)

    def take(self, value: ir.Value | None) -> ir.Value | None:
        return None if value is None else self.new.get(value, value)

    def reshape(self, node: ir.Node, value: ir.Value, rest: list[Dim]) -> ir.Value:
        """The value as [M, *rest]; reshapes in a row become one, or none."""
        sizes = [size for size in rest if isinstance(size, int)]
        source = producer(value, "Reshape")
        while source is not None and source.inputs[0] is not None:
            value, source = source.inputs[0], producer(source.inputs[0], "Reshape")
        if dims(value) == (M, *sizes):
            return value
        return emit(node, "Reshape", [value, ints_constant(self.graph, [-1, *sizes])])[0]

    def axis(self, node: ir.Node, axis: int) -> int:
        """What an axis of the node's first input is called without batch and sequence."""
        value = node.inputs[0]
        assert value is not None
        axis %= len(dims(value))
        if axis in token_axes(value):
            raise self.refusal(node, "runs along the tokens")
        return 1 + other_axes(value).index(axis)

    def moved_axes(self, node: ir.Node, operand: ir.Value | None) -> ir.Value | None:
        axes = ints(operand)
        return None if axes is None else ints_constant(self.graph, [self.axis(node, axis) for axis in axes])


# -- one rule an operator, or several of one kind ------------------------------------------------------------------

Rule = Callable[[Flattening, ir.Node], "list[ir.Value]"]


def elementwise(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Operands meet as before: those with tokens have one rank, the others no axis where tokens are."""
    rank = len(dims(node.outputs[0]))
    operands: list[ir.Value | None] = []
    for value in node.inputs:
        operands.append(flat.take(value))
        if value is None:
            continue
        after_tokens = rank - 1 - max(token_axes(node.outputs[0]))
        in_front = dims(value)[: max(0, len(dims(value)) - after_tokens)]
        if not token_axes(value) and weight_of(value) and set(in_front) == {1}:
            operands[-1] = of_each_token(flat.graph, value, after_tokens)
        elif not token_axes(value) and len(dims(value)) > after_tokens:
            raise flat.refusal(node, f"takes {value.name} of shape {value.shape}")
        elif token_axes(value) and len(dims(value)) != rank:
            operands[-1] = aligned(flat, node, value)
    return flat.emit(node, node.op_type, operands, **attributes_of(node))


def aligned(flat: Flattening, node: ir.Node, value: ir.Value) -> ir.Value:
    """A value with as many axes as the node's result: 1s in front of its own, tokens in the same place."""
    result = node.outputs[0]
    n_new = len(dims(result)) - len(dims(value))
    if token_axes(result) != tuple(axis + n_new for axis in token_axes(value)):
        raise flat.refusal(node, f"takes {value.name} of shape {value.shape}")
    others = [dims(value)[axis] for axis in other_axes(value)]
    return flat.reshape(node, flat.new[value], [*[1] * n_new, *others])


def of_each_token(graph: ir.Graph, value: ir.Value, rank: int) -> ir.Value:
    """A weight [1, …, 1, its last axes] that is the same for every token, without the axes in front."""
    weight = weight_of(value)
    assert weight is not None, "asked before"
    shape = weight.dims[len(weight.dims) - rank :]
    made_of = ("flat", shape, weight)
    flat = Weight.computed(
        f"{weight.name}.flat", shape, lambda: weight.unrounded().reshape(shape), weight.stored_dtype, made_of
    )
    return add_constant(graph, flat, str(flat.name))


def along_one_axis(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Softmax, norms, Concat, Split: the axis gets its new number; the last one stays the last."""
    attributes = attributes_of(node)
    if "axis" in attributes or node.op_type != "Split":
        axis = flat.axis(node, attributes.get("axis", -1))
        attributes["axis"] = -1 if axis == len(other_axes(node.outputs[0])) else axis
    return flat.emit(node, node.op_type, [flat.take(value) for value in node.inputs], **attributes)


def top_k(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """The largest of each token's own elements."""
    attributes = attributes_of(node)
    axis = flat.axis(node, attributes.get("axis", -1))
    attributes["axis"] = -1 if axis == len(other_axes(node.outputs[0])) else axis
    attributes["sorted"] = 1  # where any order will do, this one does, which TVM's importer asks for
    return flat.emit(node, "TopK", [flat.take(node.inputs[0]), node.inputs[1]], **attributes)


def gather_elements(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """GatherElements among each token's own numbers: index has the tokens' axes where x has them."""
    x, index = node.inputs
    if token_axes(x) != token_axes(index):
        raise flat.refusal(node, "looks up by token")
    axis = flat.axis(node, attribute(node, "axis", 0))
    return flat.emit(node, "GatherElements", [flat.take(x), flat.take(index)], axis=axis)


def experts(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """x, index, share [batch·sequence, …] become [M, …]."""
    if any(token_axes(value) != (0,) for value in node.inputs[:3]):
        raise flat.refusal(node, "has tokens elsewhere than in axis 0")
    return flat.emit(node, op_name(node), [flat.take(value) for value in node.inputs], **attributes_of(node))


def keep_groups(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """scores [batch·sequence, E] become [M, E]."""
    return flat.emit(node, op_name(node), [flat.take(node.inputs[0])], **attributes_of(node))


def with_state(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Operands [sequence, batch, …], in which order sequences do not see each other, become [M, …]; weights stay."""
    if any(token_axes(v) and list(map(str, dims(v)[:2])) != ["sequence", "batch"] for v in node.inputs):
        raise flat.refusal(node, "has tokens elsewhere than in axes 0 and 1")
    return flat.emit(node, op_name(node), [flat.take(value) for value in node.inputs], **attributes_of(node))


def product(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """MatMul, Gemm: activations times a matrix that is the same for every token, or each token's times its own."""
    x, weight, *rest = node.inputs
    if node.op_type == "MatMul" and is_each_tokens_own(x) and is_each_tokens_own(weight):
        return flat.emit(node, "MatMul", [flat.take(x), flat.take(weight)])
    if token_axes(weight) or not x or len(dims(x)) - 1 in token_axes(x) or attribute(node, "transA", 0):
        raise flat.refusal(node, "multiplies along the tokens")
    *others, size = (dims(x)[axis] for axis in other_axes(x))
    if any(other != 1 for other in others):
        raise flat.refusal(node, f"takes {x.name} of shape {x.shape}")
    rows = flat.reshape(node, flat.new[x], [size])
    y = flat.emit(node, node.op_type, [rows, weight, *rest], **attributes_of(node))[0]
    return [flat.reshape(node, y, [*others, dims(y)[-1]])]


def is_each_tokens_own(matrix: ir.Value | None) -> bool:
    """[batch, sequence, K, N]"""
    return matrix is not None and len(dims(matrix)) == 4 and token_axes(matrix) == (0, 1)


def pool(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """x [batch, sequence, K] becomes [M, K]."""
    if token_axes(node.inputs[0]) != (0, 1):
        raise flat.refusal(node, "has tokens elsewhere than in axes 0 and 1")
    return flat.emit(node, op_name(node), [flat.take(node.inputs[0])], **attributes_of(node))


def gather_turned(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """turns [batch, sequence, 3] become [M, 3]."""
    table, turns = node.inputs
    return flat.emit(node, op_name(node), [table, flat.take(turns)], **attributes_of(node))


def pad(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Each token's own elements, behind the last axis."""
    x, pads, value, axes = (*node.inputs, None, None)[:4]
    if ints(axes) != [-1] or token_axes(x)[-1:] == (len(dims(x)) - 1,):
        raise flat.refusal(node, "adds tokens")
    return flat.emit(node, "Pad", [flat.take(x), pads, value, axes], **attributes_of(node))


def gather(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    table, at = node.inputs
    if not token_axes(table):
        return flat.emit(node, "Gather", [table, flat.take(at)], axis=attribute(node, "axis", 0))
    if token_axes(at):
        raise flat.refusal(node, "looks tokens up in tokens")
    return flat.emit(node, "Gather", [flat.take(table), at], axis=flat.axis(node, attribute(node, "axis", 0)))


def reshape(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Reshape, Squeeze, Unsqueeze within each token; the tokens lead before and after, but for 1s, or only 1s come and
    go."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    before, after = ([dims(value)[axis] for axis in other_axes(value)] for value in (x, y))
    leading = all(dims(value)[axis] == 1 for value in (x, y) for axis in between(value))
    if not leading and [size for size in before if size != 1] != [size for size in after if size != 1]:
        raise flat.refusal(node, f"turns {x.shape} into {y.shape}")
    return [flat.reshape(node, flat.new[x], after)]


def transpose(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Only the order of the other axes is left."""
    x = node.inputs[0]
    assert x is not None
    before = other_axes(x)
    perm = attribute(node, "perm") or list(reversed(range(len(dims(x)))))
    order = [0, *(1 + before.index(axis) for axis in perm if axis in before)]
    if order == list(range(len(order))):
        return [flat.new[x]]
    return flat.emit(node, "Transpose", [flat.new[x]], perm=order)


def slice_(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    x, starts, ends, *rest = node.inputs
    steps = ints(rest[1]) if len(rest) > 1 else None
    if x is not None and dims(x) == dims(node.outputs[0]):
        if any(step != 1 for step in steps or ()):
            raise flat.refusal(node, "turns the order round")
        return [flat.new[x]]
    if not rest:
        raise flat.refusal(node, "names no axes")
    return flat.emit(node, "Slice", [flat.take(x), starts, ends, flat.moved_axes(node, rest[0]), *rest[1:]])


def expand(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """Expand, Tile: axes of 1 in each token are repeated."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    rows = aligned(flat, node, x)
    sizes = [size for axis in other_axes(y) if isinstance(size := dims(y)[axis], int)]
    if any(before not in (1, after) for before, after in zip(dims(rows)[1:], sizes, strict=True)):
        raise flat.refusal(node, "repeats more than one element")
    if list(dims(rows)[1:]) == sizes:
        return [rows]
    return flat.emit(node, "Expand", [rows, ints_constant(flat.graph, [1, *sizes])])


def reduction(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    x, *axes = node.inputs
    return flat.emit(node, node.op_type, [flat.take(x), flat.moved_axes(node, *axes)], **attributes_of(node))


def rotary(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """x [batch, heads, sequence, D] becomes [M, heads·D]."""
    x, cos, sin, *positions = node.inputs
    if positions or x is None or cos is None or sin is None or token_axes(x) != (0, 2):
        raise flat.refusal(node, "has positions, or heads elsewhere than in axis 1")
    _, heads, _, head_dim = dims(x)
    assert isinstance(heads, int)
    assert isinstance(head_dim, int)
    result = emit(
        node,
        f"{DOMAIN}.Rotary",
        [flat.reshape(node, flat.new[x], [heads * head_dim]), flat.new[cos], flat.new[sin]],
        num_heads=heads,
        rotary_dim=attribute(node, "rotary_embedding_dim", 0) or head_dim,
        interleaved=attribute(node, "interleaved", 0),
    )
    return [flat.reshape(node, result[0], [heads, head_dim])]


def attention(flat: Flattening, node: ir.Node) -> list[ir.Value]:
    """q [batch, H, sequence, D], k, v [batch, KH, sequence, D] become [M, H·D], [M, KH·D]; v may have heads of another
    size; sinks, slopes [H] and biases [H, 2 C] stay."""
    q, k, v, *more = node.inputs
    of_heads = more if node.domain == DOMAIN else []
    if not of_heads and any(more):
        raise flat.refusal(node, "has a mask or a cache")
    is_causal = node.op_type in OF_HEADS or bool(attribute(node, "is_causal", 0))
    kind = "Causal" if is_causal else "Bidirectional"
    if any(token_axes(value) != (0, 2) for value in (q, k, v)):
        raise flat.refusal(node, "has tokens elsewhere than in axes 0 and 2")
    heads = [dims(value)[1] for value in (q, k, v)]
    sizes = [dims(value)[3] for value in (q, k, v)]
    if sizes[0] != sizes[1] or heads[1] != heads[2]:
        raise flat.refusal(node, f"has heads {heads} of sizes {sizes}")
    head_dim = sizes[0]
    assert isinstance(head_dim, int)
    assert isinstance(heads[0], int)
    assert isinstance(heads[1], int)
    if heads[0] % heads[1]:
        raise flat.refusal(node, f"has {heads[0]} heads of queries, which {heads[1]} of keys cannot share alike")
    rows: list[ir.Value | None] = []
    for value, n_heads, size in zip((q, k, v), heads, sizes, strict=True):
        assert value is not None
        assert isinstance(n_heads, int)
        assert isinstance(size, int)
        rows.append(flat.reshape(node, flat.new[value], [n_heads * size]))
    result = emit(
        node,
        f"{DOMAIN}.{node.op_type.removesuffix('Attention')}{kind}Attention",
        [*rows, *of_heads],
        num_heads=heads[0],
        kv_num_heads=heads[1],
        scale=float(attribute(node, "scale", head_dim**-0.5)),
        softcap=float(attribute(node, "softcap", 0.0)),
        window=int(node.metadata_props.get("llmc.window", "0")),
        layer=int(node.metadata_props.get("llmc.layer", "0")),
    )
    return [flat.reshape(node, result[0], [heads[0], sizes[2]])]


OF_HEADS = ("SinkAttention", "AlibiAttention")
"""Attention that is causal whatever it says."""
ALONG_ONE_AXIS = ("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "Concat", "Split")

RULES: dict[str, Rule] = {
    **dict.fromkeys((SAME_AS_FIRST | BROADCAST) - {"Trilu"}, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(ALONG_ONE_AXIS, along_one_axis),
    **dict.fromkeys(("MatMul", "Gemm"), product),
    "Pad": pad,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze"), reshape),
    **dict.fromkeys((f"{DOMAIN}.{name}" for name in (*EXPERTS, *CLAMPED_EXPERTS)), experts),
    f"{DOMAIN}.KeepGroups": keep_groups,
    f"{DOMAIN}.{GATHER_TURNED}": gather_turned,
    **dict.fromkeys((f"{DOMAIN}.{name}" for name in (*POOLS, EMBEDDED, DEEPENED)), pool),
    **dict.fromkeys((f"{DOMAIN}.{name}" for name in WITH_STATES), with_state),
    **dict.fromkeys(("Attention", *(f"{DOMAIN}.{kind}Attention" for kind in ("Sink", "Alibi", "Distance"))), attention),
    **dict.fromkeys(("Expand", "Tile"), expand),
    "Gather": gather,
    "GatherElements": gather_elements,
    "RotaryEmbedding": rotary,
    "Slice": slice_,
    "TopK": top_k,
    "Transpose": transpose,
}

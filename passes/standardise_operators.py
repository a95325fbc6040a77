"""Write operators of ONNX Runtime (com.microsoft) as the standard ones that they are defined by.

rewrite:
    com.microsoft.SkipSimplifiedLayerNormalization(x, residual, w)      likewise SkipLayerNormalization
    -->
    RMSNormalization(Add(x, residual), w)

    com.microsoft.BiasGelu(x, b)      likewise Gelu, FastGelu, QuickGelu
    -->
    Gelu(Add(x, b))

    com.microsoft.FusedMatMul(q, k, transB=1, alpha=s)      likewise FusedGemm
    -->
    Mul(MatMul(q, Transpose(k)), s)

    com.microsoft.GroupQueryAttention(qkv, …, cos_cache, sin_cache, do_rotary=1, local_window_size=w)
    -->
    Attention(RotaryEmbedding(q, Gather(cos_cache, position_ids), Gather(sin_cache, position_ids)), …, v, mask)

    com.microsoft.MultiHeadAttention(q, k, v, bias, attention_bias=mask)
    -->
    Attention(Add(q, bias[:n]), Add(k, bias[n:2n]), Add(v, bias[2n:]), mask)

    GatherND(x, Unsqueeze(at, -1))      of one axis, as PyTorch's exporter writes x[at] and x[:, [at]]
    -->
    Gather(x, at)
refuses: an input, an attribute or a result of theirs that has no such definition here, quantised ones among them; a
GroupQueryAttention whose lengths are not those of the attention mask.

These are what ONNX Runtime's optimiser, Olive and the builder of onnxruntime-genai write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, ints_constant, producer, prune, replace
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import BROADCAST, SAME_AS_FIRST
from llmc.compiler.graph.text import op_name
from llmc.passes.drop_cache import made
from llmc.runtime.errors import LlmcError

DOMAIN = "com.microsoft"
Results = Sequence[ir.Value | None]
NEUTRAL: Mapping[str, tuple[object, ...]] = {"causal": (1,), "stash_type": (1,), "kv_cache_bit_width": (0, 8, 16)}
"""Attributes, and the values of them that change nothing; beside 0, -1 and "NONE", which never do."""


class Rule(NamedTuple):
    """write(node) -> what takes the place of each result.  inputs: how many it understands, or which; attributes: those
    that it understands."""

    write: Callable[[ir.Node], Results]
    inputs: Sequence[int]
    attributes: tuple[str, ...] = ()


def standardise_operators(model: ir.Model) -> int:
    """Assumes what drop_cache leaves; shapes are resolve_shapes' to settle. Leaves standard operators, where there is a
    rule. Returns the number of nodes written otherwise."""
    graph = model.graph
    n_rewrites = 0
    for node in list(graph):
        rule = RULES.get(op_name(node))
        if rule is None:
            continue
        if node.op_type == "GatherND" and not is_of_one_axis(node):
            continue
        refuse_others(node, rule)
        results = rule.write(node)
        for index, old in enumerate(node.outputs):
            if not old.uses() and not old.is_graph_output():
                continue
            new = results[index] if index < len(results) else None
            if new is None:
                raise LlmcError(f"result {index} of a {op_name(node)} is not compiled", place=f"node {node.name}")
            new.name = new.name or old.name
            replace(old, new)
        n_rewrites += 1
    graph.opset_imports.pop(DOMAIN, None)
    prune(reversed(graph))
    return n_rewrites


def refuse_others(node: ir.Node, rule: Rule) -> None:
    place = f"node {node.name}"
    for index, value in enumerate(node.inputs):
        if value is not None and index not in rule.inputs:
            raise LlmcError(f"a {op_name(node)} with its input {index} ({value.name}) is not compiled", place=place)
    for name, said in node.attributes.items():
        if name not in rule.attributes and said.value not in (0, -1, "NONE", *NEUTRAL.get(name, ())):
            raise LlmcError(f"a {op_name(node)} with {name}={said.value} is not compiled", place=place)


# -- look-ups ------------------------------------------------------------------------------------------------------


def is_of_one_axis(node: ir.Node) -> bool:
    """Whether a GatherND's indices are numbers of entries of the first axis."""
    at = node.inputs[1]
    return at is not None and at.shape is not None and at.shape[-1] == 1 and not attribute(node, "batch_dims", 0)


def of_one_axis(node: ir.Node) -> Results:
    x, at = node.inputs
    return [made(node, "Gather", [x, made(node, "Squeeze", [at, ints(node, -1)])], axis=0)]


# -- norms, activations, products ----------------------------------------------------------------------------------


def simplified_norm(node: ir.Node) -> Results:
    settings = {name: attribute(node, name, default) for name, default in (("axis", -1), ("epsilon", 1e-5))}
    return [made(node, "RMSNormalization", node.inputs[:2], **settings)]


def skip_norm(node: ir.Node) -> Results:
    """input, skip, gamma, [beta], [bias], or without beta for a root mean square: normed, -, -, what was normed."""
    is_rms = node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, gamma, *more = node.inputs
    beta = None if is_rms else (more.pop(0) if more else None)
    total = made(node, "Add", [x, skip])
    if more and more[0] is not None:
        total = made(node, "Add", [total, more[0]])
    epsilon = attribute(node, "epsilon", 1e-12)
    operands = [total, gamma] if beta is None else [total, gamma, beta]
    op = "RMSNormalization" if is_rms else "LayerNormalization"
    return [made(node, op, operands, axis=-1, epsilon=epsilon), None, None, total]


def gelu(node: ir.Node) -> Results:
    x, *bias = (value for value in node.inputs if value is not None)
    total = made(node, "Add", [x, bias[0]]) if bias else x
    return [made(node, "Gelu", [total], approximate="tanh" if node.op_type == "FastGelu" else "none")]


def quick_gelu(node: ir.Node) -> Results:
    x, alpha = node.inputs[0], float(attribute(node, "alpha", 1.702))
    inner = x if alpha == 1 else made(node, "Mul", [x, number(node, alpha)])
    return [made(node, "Mul", [x, made(node, "Sigmoid", [inner])])]


def fused_product(node: ir.Node) -> Results:
    """alpha * A @ B, the last two axes of either perhaps turned."""
    operands = []
    for value, name in zip(node.inputs, ("transA", "transB"), strict=True):
        if not attribute(node, name, 0):
            operands.append(value)
            continue
        n_axes = n_axes_of(value)
        if n_axes < 2:
            fact = "a com.microsoft.FusedMatMul turns a matrix of no said shape"
            raise LlmcError(fact, place=f"node {node.name}", hint="keep the shapes of values in the file")
        *outer, rows, columns = range(n_axes)
        operands.append(made(node, "Transpose", [value], perm=[*outer, columns, rows]))
    product, alpha = made(node, "MatMul", operands), float(attribute(node, "alpha", 1.0))
    return [product if alpha == 1 else made(node, "Mul", [product, number(node, alpha)])]


def fused_gemm(node: ir.Node) -> Results:
    """activation(alpha * A @ B + beta * C)."""
    activation = str(attribute(node, "activation", ""))
    if activation not in ("Relu", "Sigmoid", "Tanh"):
        raise LlmcError(f"a com.microsoft.FusedGemm with {activation!r} is not compiled", place=f"node {node.name}")
    names = ("alpha", "beta", "transA", "transB")
    settings = {name: attribute(node, name) for name in names if name in node.attributes}
    return [made(node, activation, [made(node, "Gemm", node.inputs, **settings)])]


def n_axes_of(value: ir.Value | None, depth: int = 8) -> int:
    """The number of axes of a value whose shape is not settled yet; 0 if it cannot be told.  resolve_shapes refuses
    what is wrong."""
    node = value.producer() if value is not None else None
    if value is None or value.shape is not None or node is None or not depth:
        return len(value.shape) if value is not None and value.shape is not None else 0
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(attribute(node, "perm"))
    if node.op_type == "Reshape":
        sizes, parts = constant(node.inputs[1]), producer(node.inputs[1], "Concat")
        return sizes.size if sizes is not None else len(parts.inputs) if parts is not None else 0
    if node.op_type in SAME_AS_FIRST or node.op_type in ("Concat", "Slice", "Split"):
        return n_axes_of(node.inputs[0], depth - 1)
    return max(n_axes_of(operand, depth - 1) for operand in node.inputs) if node.op_type in BROADCAST else 0


def number(node: ir.Node, value: float) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return add_constant(node.graph, np.array(value, np.float32), f"scalar.float32.{value}")


def ints(node: ir.Node, *numbers: int) -> ir.Value:
    assert isinstance(node.graph, ir.Graph)
    return ints_constant(node.graph, numbers)


# -- attention -----------------------------------------------------------------------------------------------------


def rotary(node: ir.Node) -> Results:
    """input [batch, sequence, H * D] or [batch, H, sequence, D], position_ids, cos_cache, sin_cache."""
    x, at, *tables = node.inputs
    names = ("interleaved", "num_heads", "rotary_embedding_dim")
    interleaved, n_heads, n_turned = (int(attribute(node, name, 0)) for name in names)
    width = constant(tables[0])
    is_plain = attribute(node, "scale", 1.0) == 1 and at is not None and (at.shape is None or len(at.shape) == 2)
    if not is_plain or x is None or x.shape is None or width is None:
        fact = "a com.microsoft.RotaryEmbedding with a scale, an offset, no constant tables or no shape is not compiled"
        raise LlmcError(fact, place=f"node {node.name}")
    angles = [made(node, "Gather", [table, at], axis=0) for table in tables]
    settings = {"interleaved": interleaved, "rotary_embedding_dim": n_turned}
    if len(x.shape) == 4:
        return [made(node, "RotaryEmbedding", [x, *angles], **settings)]
    sizes = (n_heads, -1) if n_heads else (-1, 2 * int(width.shape.numpy()[-1]))
    apart = heads_apart(node, x, *sizes)
    return [heads_joined(node, made(node, "RotaryEmbedding", [apart, *angles], **settings))]


def group_query(node: ir.Node) -> Results:
    """query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids."""
    q, k, v, past, more_past, *lengths = (*node.inputs, *[None] * 10)[:7]
    check_past(node, past, more_past)
    check_lengths(node, lengths)
    n_heads, n_kv = (int(attribute(node, name)) for name in ("num_heads", "kv_num_heads"))
    if k is None or v is None:
        q, k, v = unpacked(node, q, past, n_heads, n_kv)
    q, k, v = (heads_apart(node, x, n) for x, n in ((q, n_heads), (k, n_kv), (v, n_kv)))
    assert isinstance(node.graph, ir.Graph)
    positions = node.graph.inputs[1]
    if attribute(node, "do_rotary", 0):
        at = (node.inputs[9] if len(node.inputs) > 9 else None) or positions
        angles = [made(node, "Gather", [table, at], axis=0) for table in node.inputs[7:9]]
        settings = {"interleaved": int(attribute(node, "rotary_interleaved", 0))}
        q, k = (made(node, "RotaryEmbedding", [x, *angles], num_heads=n, **settings)
                for x, n in ((q, n_heads), (k, n_kv)))  # fmt: skip
    window = int(attribute(node, "local_window_size", -1))
    mask = [near(node, positions, window)] if window > 0 else []
    scale, softcap = (float(attribute(node, name, 0.0)) for name in ("scale", "softcap"))
    scaling = {"scale": scale} if scale else {}
    return [heads_joined(node, made(node, "Attention", [q, k, v, *mask], is_causal=1, softcap=softcap, **scaling))]


def multi_head(node: ir.Node) -> Results:
    """query, key, value [batch, sequence, H * D], bias of all three, -, attention_bias, past_key, past_value."""
    q, k, v, bias, _, mask, *past = (*node.inputs, *[None] * 8)[:8]
    if q is None or k is None or v is None:
        fact = "a MultiHeadAttention of packed queries, keys and values is not compiled"
        raise LlmcError(fact, place=f"node {node.name}")
    check_past(node, *past)
    operands = [q, k, v]
    if bias is not None:
        tensor = constant(bias)
        size = tensor.size // 3 if tensor is not None else 0
        ends = [[ints(node, n) for n in (i * size, i * size + size, 0)] for i in range(3)]
        parts = [made(node, "Slice", [bias, *end]) for end in ends]
        operands = [made(node, "Add", [x, part]) for x, part in zip(operands, parts, strict=True)]
    n_heads, scale = int(attribute(node, "num_heads")), float(attribute(node, "scale", 0.0))
    apart = [heads_apart(node, x, n_heads) for x in operands]
    settings: dict[str, Any] = {"is_causal": int(attribute(node, "unidirectional", 0))}
    settings |= {"scale": scale} if scale else {}
    return [heads_joined(node, made(node, "Attention", [*apart, *([mask] if mask is not None else [])], **settings))]


def check_past(node: ir.Node, *caches: ir.Value | None) -> None:
    """They hold no token, as drop_cache leaves them."""
    for cache in caches:
        made_of = producer(cache, "Expand")
        tensor = constant(made_of.inputs[0]) if made_of is not None else None
        if cache is not None and (tensor is None or tensor.size):
            raise LlmcError(f"a {op_name(node)} has a cache of its own", place=f"node {node.name}")


def check_lengths(node: ir.Node, lengths: Sequence[ir.Value | None]) -> None:
    """seqlens_k is the length but 1, total_sequence_length the length: nothing is padded."""
    assert isinstance(node.graph, ir.Graph)
    ids = node.graph.inputs[0]
    feeds = {str(ids.name): np.zeros((1, 11), np.int64)}
    for value, wanted in zip(lengths, (10, 11), strict=True):
        try:
            found = runner(extract(value, [ids]))(feeds) if value is not None else {}
        except LlmcError:
            found = {}  # it is made of something else than the mask
        if not found or any((array != wanted).any() for array in found.values()):
            fact = "a GroupQueryAttention takes lengths that are not those of the attention mask"
            raise LlmcError(fact, place=f"node {node.name}")


def unpacked(node: ir.Node, qkv: ir.Value | None, past: ir.Value | None, n_heads: int, n_kv: int) -> list[ir.Value]:
    """Queries, keys and values [batch, sequence, …] that lie one after the other; how wide, the cache says."""
    nothing = producer(past, "Expand")
    tensor = constant(nothing.inputs[0]) if nothing is not None else None
    if tensor is None:
        fact = "a GroupQueryAttention of packed queries, keys and values has no cache that says how wide they are"
        raise LlmcError(fact, place=f"node {node.name}")
    size = int(tensor.shape.numpy()[-1])
    sizes = ints(node, n_heads * size, n_kv * size, n_kv * size)
    split = ir.Node("", "Split", [qkv, sizes], [ir.AttrInt64("axis", -1)], num_outputs=3)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, split)
    return list(split.outputs)


def near(node: ir.Node, positions: ir.Value, window: int) -> ir.Value:
    """bool [batch, 1, sequence, sequence]: keys among the last `window` tokens."""
    ends = [made(node, "Unsqueeze", [positions, ints(node, *axes)]) for axes in ((1, 3), (1, 2))]
    return made(node, "Less", [made(node, "Sub", ends), ints(node, window)])


def heads_apart(node: ir.Node, x: ir.Value | None, n_heads: int, size: int = -1) -> ir.Value:
    """[batch, sequence, H * D] as [batch, H, sequence, D]."""
    return made(node, "Transpose", [made(node, "Reshape", [x, ints(node, 0, 0, n_heads, size)])], perm=[0, 2, 1, 3])


def heads_joined(node: ir.Node, x: ir.Value) -> ir.Value:
    return made(node, "Reshape", [made(node, "Transpose", [x], perm=[0, 2, 1, 3]), ints(node, 0, 0, -1)])


RULES: Mapping[str, Rule] = {
    "GatherND": Rule(of_one_axis, range(2)),
    "SimplifiedLayerNormalization": Rule(simplified_norm, range(2), ("axis", "epsilon")),
    f"{DOMAIN}.SkipSimplifiedLayerNormalization": Rule(skip_norm, range(4), ("epsilon",)),
    f"{DOMAIN}.SkipLayerNormalization": Rule(skip_norm, range(5), ("epsilon",)),
    f"{DOMAIN}.Gelu": Rule(gelu, range(1)),
    f"{DOMAIN}.BiasGelu": Rule(gelu, range(2)),
    f"{DOMAIN}.FastGelu": Rule(gelu, range(2)),
    f"{DOMAIN}.QuickGelu": Rule(quick_gelu, range(1), ("alpha",)),
    f"{DOMAIN}.FusedGemm": Rule(fused_gemm, range(3), ("alpha", "beta", "transA", "transB", "activation")),
    f"{DOMAIN}.FusedMatMul": Rule(fused_product, range(2), ("transA", "transB", "alpha")),
    f"{DOMAIN}.RotaryEmbedding": Rule(rotary, range(4), ("interleaved", "num_heads", "rotary_embedding_dim", "scale")),
    f"{DOMAIN}.MultiHeadAttention": Rule(
        multi_head, (0, 1, 2, 3, 5, 6, 7), ("num_heads", "scale", "unidirectional", "mask_filter_value")
    ),
    f"{DOMAIN}.GroupQueryAttention": Rule(
        group_query,
        range(10),
        ("num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved", "local_window_size"),
    ),
}

"""Shapes and element types of a node's results, from those of its inputs.

A shape is a tuple of numbers and symbols. Every pass leaves every value with one, so each node it makes is put through
`infer`. A standard operator without a rule here is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops import DOMAIN, OPERATORS, ROUTERS
from llmc.compiler.ops.define import Dim, Dims
from llmc.runtime.errors import LlmcError

Rule = Callable[[ir.Node], "list[Dims]"]

SAME_AS_FIRST = frozenset(
    [
        "Abs",
        "Cast",
        "Ceil",
        "Clip",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSwish",
        "Identity",
        "IsNaN",
        "LayerNormalization",
        "LeakyRelu",
        "Log",
        "LogSoftmax",
        "Neg",
        "Not",
        "RMSNormalization",
        "Reciprocal",
        "Relu",
        "RotaryEmbedding",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Tanh",
        "Trilu",
    ]
)
BROADCAST = frozenset(
    [
        "Add",
        "And",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "Pow",
        "Sub",
        "Sum",
        "Where",
        "Xor",
    ]
)
BOOLEAN = frozenset(["And", "Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"])
REDUCTIONS = frozenset(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"])


def infer(node: ir.Node) -> None:
    """Set shape and element type of every result of `node`, whose inputs have theirs."""
    if node.domain == DOMAIN:
        shapes: Sequence[Dims] = OPERATORS[node.op_type].result_shapes(
            [dims(value) for value in node.inputs if value is not None],
            {name: attribute.value for name, attribute in node.attributes.items()},
        )
    else:
        rule = rule_of(node)
        if rule is None:
            raise LlmcError(f"the passes know no shape for the ONNX operator {node.op_type}", place=f"node {node.name}")
        shapes = rule(node)
    for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=False)):
        value.shape = ir.Shape(shape)
        dtype = result_dtype(node, index)
        if dtype is not None:
            value.dtype = dtype


def infer_missing(nodes: Iterable[ir.Node]) -> None:
    """Infer for the nodes, in topological order, that have a result without a shape or type."""
    for node in nodes:
        if any(value.shape is None or value.dtype is None for value in node.outputs):
            infer(node)


def dims(value: ir.Value | None) -> Dims:
    """The shape of a value, as a tuple."""
    if value is None or value.shape is None:
        raise LlmcError("a value has no shape", place=f"value {value and value.name}")
    return tuple(value.shape)


def rule_of(node: ir.Node) -> Rule | None:
    if node.op_type in SAME_AS_FIRST:
        return lambda node: [dims(node.inputs[0])]
    if node.op_type in BROADCAST:
        return lambda node: [broadcast([dims(value) for value in node.inputs])]
    if node.op_type in REDUCTIONS:
        return reduction
    return RULES.get(node.op_type)


def result_dtype(node: ir.Node, index: int) -> ir.DataType | None:
    """The type of a node's result of this index."""
    if node.domain == DOMAIN:
        return ir.DataType.INT64 if node.op_type in ROUTERS and index == 1 else ir.DataType.FLOAT
    if node.op_type in BOOLEAN:
        return ir.DataType.BOOL
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Shape", "ArgMax") or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    source = node.inputs[1 if node.op_type == "Where" else 0]
    return source.dtype if source is not None else None


def ints(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant vector of integers; None when the input is left out."""
    if value is None:
        return None
    if value.const_value is None:
        raise LlmcError("axes, sizes and shapes must be constants here", place=f"value {value.name}")
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def axis_of(node: ir.Node, rank: int, default: int = 0) -> int:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else default
    return axis % rank


def broadcast(shapes: Sequence[Dims]) -> Dims:
    """NumPy's rule; a symbol meets a 1 or itself."""
    rank = max(map(len, shapes))
    columns = zip(*((*(1,) * (rank - len(shape)), *shape) for shape in shapes), strict=True)
    result: list[Dim] = []
    for column in columns:
        sizes = {size for size in column if size != 1}
        if len(sizes) > 1:
            raise LlmcError(f"shapes {' and '.join(map(str, shapes))} cannot be broadcast together")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def matmul(node: ir.Node) -> list[Dims]:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    if len(b) == 1:
        return [a[:-1]]
    outer = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else ()
    return [(*outer, *a[-2:-1], b[-1])]


def gemm(node: ir.Node) -> list[Dims]:
    a, b = dims(node.inputs[0]), dims(node.inputs[1])
    rows = a[1 if flag(node, "transA") else 0]
    return [(rows, b[0 if flag(node, "transB") else 1])]


def flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def gather(node: ir.Node) -> list[Dims]:
    data, at = dims(node.inputs[0]), dims(node.inputs[1])
    axis = axis_of(node, len(data))
    return [(*data[:axis], *at, *data[axis + 1 :])]


def gather_nd(node: ir.Node) -> list[Dims]:
    data, at = dims(node.inputs[0]), dims(node.inputs[1])
    batch = node.attributes["batch_dims"].as_int() if "batch_dims" in node.attributes else 0
    n_coordinates = at[-1]
    assert isinstance(n_coordinates, int)
    return [(*at[:-1], *data[batch + n_coordinates :])]


def transpose(node: ir.Node) -> list[Dims]:
    shape = dims(node.inputs[0])
    default = range(len(shape) - 1, -1, -1)
    return [tuple(shape[i] for i in (node.attributes["perm"].as_ints() if "perm" in node.attributes else default))]


def reshape(node: ir.Node) -> list[Dims]:
    """0 keeps a size. -1 takes what is left: a number, or the one symbol."""
    shape = dims(node.inputs[0])
    target = ints(node.inputs[1]) or []
    result: list[Dim] = [shape[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 in result:
        left = [size for size in shape if not isinstance(size, int)]
        for size in result:
            if not isinstance(size, int):
                left.remove(size)
        known = prod(size for size in result if isinstance(size, int) and size != -1)
        rest = prod(size for size in shape if isinstance(size, int)) // max(known, 1)
        if len(left) > 1 or (left and rest != 1):
            raise LlmcError(f"{shape} cannot be reshaped to {target}", place=f"node {node.name}")
        result[result.index(-1)] = left[0] if left else rest
    return [tuple(result)]


def concat(node: ir.Node) -> list[Dims]:
    shapes = [dims(value) for value in node.inputs]
    axis = axis_of(node, len(shapes[0]))
    parts = [shape[axis] for shape in shapes]
    if not all(isinstance(part, int) for part in parts):
        raise LlmcError("tokens cannot be concatenated", place=f"node {node.name}")
    return [(*shapes[0][:axis], sum(part for part in parts if isinstance(part, int)), *shapes[0][axis + 1 :])]


def split(node: ir.Node) -> list[Dims]:
    shape = dims(node.inputs[0])
    axis = axis_of(node, len(shape))
    whole = shape[axis]
    sizes = ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if sizes is None:
        assert isinstance(whole, int)
        each = -(-whole // len(node.outputs))
        sizes = [min(each, whole - each * i) for i in range(len(node.outputs))]
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def slice_(node: ir.Node) -> list[Dims]:
    shape = list(dims(node.inputs[0]))
    starts, ends = ints(node.inputs[1]) or [], ints(node.inputs[2]) or []
    axes = ints(node.inputs[3] if len(node.inputs) > 3 else None) or list(range(len(starts)))
    steps = ints(node.inputs[4] if len(node.inputs) > 4 else None) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = shape[axis]
        if not isinstance(size, int):
            raise LlmcError("tokens cannot be sliced", place=f"node {node.name}")
        shape[axis] = len(range(*slice(start, end, step).indices(size)))
    return [tuple(shape)]


def unsqueeze(node: ir.Node) -> list[Dims]:
    shape = list(dims(node.inputs[0]))
    axes = ints(node.inputs[1]) or []
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return [tuple(shape)]


def squeeze(node: ir.Node) -> list[Dims]:
    shape = dims(node.inputs[0])
    axes = ints(node.inputs[1] if len(node.inputs) > 1 else None)
    gone = {axis % len(shape) for axis in axes} if axes else {i for i, size in enumerate(shape) if size == 1}
    return [tuple(size for i, size in enumerate(shape) if i not in gone)]


def reduction(node: ir.Node) -> list[Dims]:
    shape = dims(node.inputs[0])
    axes = ints(node.inputs[1] if len(node.inputs) > 1 else None)
    gone = {axis % len(shape) for axis in axes} if axes else set(range(len(shape)))
    keep = not ("keepdims" in node.attributes and node.attributes["keepdims"].as_int() == 0)
    return [tuple(1 if i in gone else size for i, size in enumerate(shape) if keep or i not in gone)]


def expand(node: ir.Node) -> list[Dims]:
    return [broadcast([dims(node.inputs[0]), tuple(ints(node.inputs[1]) or [])])]


def attention(node: ir.Node) -> list[Dims]:
    q, v = dims(node.inputs[0]), dims(node.inputs[2])
    return [(*q[:-1], v[-1])]


def top_k(node: ir.Node) -> list[Dims]:
    shape = list(dims(node.inputs[0]))
    shape[axis_of(node, len(shape), -1)] = (ints(node.inputs[1]) or [])[0]
    return [tuple(shape)] * 2


def shape_(node: ir.Node) -> list[Dims]:
    rank = len(dims(node.inputs[0]))
    ends = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    return [(len(range(rank)[slice(*ends)]),)]


def pad(node: ir.Node) -> list[Dims]:
    """Padding behind the last axis; no other is known here."""
    (*shape, size), (before, behind) = dims(node.inputs[0]), ints(node.inputs[1]) or (0, 0)
    if len(node.inputs) < 4 or ints(node.inputs[3]) != [-1] or before or not isinstance(size, int):
        raise LlmcError("Pad is known where it adds behind the last axis", place=f"node {node.name}")
    return [(*shape, size + behind)]


RULES: dict[str, Rule] = {
    "Attention": attention,
    "Concat": concat,
    "Expand": expand,
    "Gather": gather,
    "GatherND": gather_nd,
    "GatherElements": lambda node: [dims(node.inputs[1])],
    "Gemm": gemm,
    "MatMul": matmul,
    "Pad": pad,
    "Reshape": reshape,
    "Shape": shape_,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "TopK": top_k,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}


def bound(shape: Iterable[Dim], sizes: dict[str, int]) -> tuple[int, ...]:
    """A shape in numbers. Raises KeyError for a symbol that `sizes` lacks."""
    return tuple(size if isinstance(size, int) else sizes[str(size.value)] for size in shape)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The plain values of a node's attributes."""
    return {name: attribute.value for name, attribute in node.attributes.items()}

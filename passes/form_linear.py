"""Give every matrix product with a weight one form: the weight as [N, K], one row an output, as checkpoints keep it.

rewrite:
    MatMul(x, Transpose(W))
    Gemm(x, W, transB=1)
    MatMul(x, V), Gemm(x, V)                 V [K, N]
    -->
    llmc.Linear(x, W)                        W = Vᵀ, transposed when it is packed

    Add(llmc.Linear(x, W), b)
    Gemm(x, W, b)
    -->
    llmc.LinearBias(x, W, b)
refuses: a product of two activations; x of other than two axes; alpha or beta other than 1; a bias that is not [N].
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, constant, emit, producer, replace, used_once, weight_of
from llmc.compiler.graph.shapes import dims
from llmc.compiler.weights import Array, Weight


def form_linear(model: ir.Model) -> int:
    """Assumes a graph over M tokens; leaves Linear and LinearBias for every product with a weight. Returns the number
    of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        form = {"MatMul": form_matmul, "Gemm": form_gemm, "Add": form_bias}.get(node.op_type)
        result = form(node) if form is not None else None
        if result is not None:
            replace(node.outputs[0], result)
            n_rewrites += 1
    return n_rewrites


def form_matmul(node: ir.Node) -> ir.Value | None:
    x, matrix = node.inputs
    weight = untransposed(node, matrix) or transposed(node, matrix)
    if weight is None or x is None or len(dims(x)) != 2:
        return None
    return emit(node, "llmc.Linear", [x, weight])[0]


def form_gemm(node: ir.Node) -> ir.Value | None:
    x, matrix, *bias = node.inputs
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)
    if not plain or matrix is None or constant(matrix) is None or len(dims(x)) != 2:
        return None
    weight = matrix if attribute(node, "transB", 0) else transposed(node, matrix)
    if weight is None or not bias or bias[0] is None:
        return emit(node, "llmc.Linear", [x, weight])[0] if weight is not None else None
    if not is_bias(bias[0], weight):
        return None
    return emit(node, "llmc.LinearBias", [x, weight, bias[0]])[0]


def form_bias(node: ir.Node) -> ir.Value | None:
    for product, bias in (node.inputs, reversed(node.inputs)):
        linear = producer(product, "llmc.Linear")
        if linear is not None and bias is not None and used_once(linear.outputs[0]) and is_bias(bias, linear.inputs[1]):
            return emit(node, "llmc.LinearBias", [*linear.inputs, bias])[0]
    return None


def is_bias(value: ir.Value, weight: ir.Value | None) -> bool:
    return constant(value) is not None and dims(value) == dims(weight)[:1]


def untransposed(node: ir.Node, matrix: ir.Value | None) -> ir.Value | None:
    """W, if the matrix is Transpose(W)."""
    transpose = producer(matrix, "Transpose")
    if transpose is None or constant(transpose.inputs[0]) is None or len(dims(transpose.inputs[0])) != 2:
        return None
    return transpose.inputs[0] if attribute(transpose, "perm", (1, 0)) == (1, 0) else None


def transposed(node: ir.Node, matrix: ir.Value | None) -> ir.Value | None:
    """A weight Vᵀ for a weight V."""
    weight = weight_of(matrix)
    if weight is None or len(weight.dims) != 2 or node.graph is None or matrix is None:
        return None
    turned: Weight = weight

    def read() -> Array:
        return turned.unrounded().T

    name = f"{matrix.name}.T"
    derived = Weight.computed(name, weight.dims[::-1], read, weight.stored_dtype, ("turned", weight))
    assert isinstance(node.graph, ir.Graph)
    return add_constant(node.graph, derived, name)

"""compiler/graph/shapes.py: its rules give what ONNX's own shape inference gives, and keep symbols."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llmc.compiler.graph.shapes import dims, infer
from llmc.runtime.errors import LlmcError

Operand = tuple[int, ...] | list[int]
"""A tuple is the shape of an input, a list a constant vector."""

NODES: list[tuple[str, list[Operand], dict[str, Any]]] = [
    ("Relu", [(2, 3)], {}),
    ("Cast", [(2, 3)], {"to": int(ir.DataType.INT64)}),
    ("RMSNormalization", [(2, 3), (3,)], {"axis": -1}),
    ("LayerNormalization", [(2, 3), (3,), (3,)], {}),
    ("RotaryEmbedding", [(1, 2, 3, 8), (1, 3, 4), (1, 3, 4)], {}),
    ("Add", [(4, 1, 3), (2, 1)], {}),
    ("Greater", [(2, 3), (3,)], {}),
    ("MatMul", [(2, 3), (3, 5)], {}),
    ("MatMul", [(4, 2, 3), (3, 5)], {}),
    ("MatMul", [(4, 1, 2, 3), (6, 3, 5)], {}),
    ("MatMul", [(2, 3), (3,)], {}),
    ("Gemm", [(2, 3), (5, 3), (5,)], {"transB": 1}),
    ("Gemm", [(3, 2), (3, 5)], {"transA": 1}),
    ("Gather", [(5, 3), (2, 4)], {}),
    ("Gather", [(5, 3), (2, 4)], {"axis": 1}),
    ("Transpose", [(2, 3, 4)], {}),
    ("Transpose", [(2, 3, 4)], {"perm": [1, 0, 2]}),
    ("Reshape", [(2, 3, 4), [0, -1]], {}),
    ("Reshape", [(2, 3, 4), [6, 4]], {}),
    ("Concat", [(2, 3), (2, 4)], {"axis": -1}),
    ("Split", [(2, 7), [3, 4]], {"axis": 1}),
    ("Split", [(2, 7)], {"axis": 1, "num_outputs": 2}),
    ("Slice", [(2, 7), [1], [-1], [1], [2]], {}),
    ("Slice", [(2, 7), [0, 1], [2, 9]], {}),
    ("Unsqueeze", [(2, 3), [0, -1]], {}),
    ("Squeeze", [(1, 2, 1), [2]], {}),
    ("Squeeze", [(1, 2, 1)], {}),
    ("Expand", [(2, 1), [3, 1, 4]], {}),
    ("TopK", [(2, 7), [3]], {}),
    ("TopK", [(2, 7, 4), [3]], {"axis": 1}),
    ("ReduceMean", [(2, 3, 4), [1]], {"keepdims": 0}),
    ("ReduceSum", [(2, 3, 4), [-1]], {}),
    ("ReduceMax", [(2, 3)], {}),
    ("Attention", [(1, 4, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)], {"is_causal": 1}),
    ("Shape", [(2, 3, 4)], {"start": 1}),
    ("Shape", [(2, 3, 4)], {"end": -1}),
]


def node_of(op: str, operands: list[Any], attributes: dict[str, Any]) -> tuple[ir.Node, list[ir.Value]]:
    """One node, and its inputs that are no constants."""
    values, inputs = [], []
    for i, operand in enumerate(operands):
        if isinstance(operand, list):
            tensor = ir.tensor(np.array(operand, dtype=np.int64), name=f"x{i}")
            shape = ir.Shape([len(operand)])
            value = ir.Value(name=f"x{i}", shape=shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        else:
            at = op == "Gather" and i == 1
            kind = ir.DataType.INT64 if at else ir.DataType.FLOAT
            value = ir.Value(name=f"x{i}", shape=ir.Shape(operand), type=ir.TensorType(kind))
            inputs.append(value)
        values.append(value)
    converted = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    return ir.Node("", op, values, converted, num_outputs=2 if op in ("Split", "TopK") else 1), inputs


@pytest.mark.parametrize(("op", "operands", "attributes"), NODES)
def test_rule_agrees_with_onnx(op: str, operands: list[Operand], attributes: dict[str, Any]) -> None:
    node, inputs = node_of(op, operands, attributes)
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    imports = {"": 23}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports=imports, name="one")
    infer(node)
    found = [(tuple(value.shape or ()), value.dtype) for value in node.outputs]
    for value in node.outputs:
        value.shape = None
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(ir.Model(graph, ir_version=10)), strict_mode=True)
    types = [value.type.tensor_type for value in proto.graph.output]
    assert found == [(tuple(size.dim_value for size in t.shape.dim), ir.DataType(t.elem_type)) for t in types]


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "wanted"),
    [
        ("Reshape", [("M", 8), [-1, 2, 4]], {}, ["M", 2, 4]),
        ("Reshape", [("M", 2, 4), [0, -1]], {}, ["M", 8]),
        ("Add", [("M", 8), (1,)], {}, ["M", 8]),
        ("MatMul", [("M", 8), (8, 3)], {}, ["M", 3]),
        ("Split", [("M", 8), [2, 6]], {"axis": 1}, ["M", 2]),
        ("Gather", [(5, 3), ("M",)], {}, ["M", 3]),
    ],
)
def test_symbols_are_kept(op: str, operands: list[Any], attributes: dict[str, Any], wanted: list[int | str]) -> None:
    node, _ = node_of(op, operands, attributes)
    infer(node)
    assert [size if isinstance(size, int) else size.value for size in dims(node.outputs[0])] == wanted


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "fact"),
    [
        ("Reshape", [("M", 8), [-1, 3]], {}, "cannot be reshaped"),
        ("Add", [("M", 8), ("R", 8)], {}, "cannot be broadcast"),
        ("Concat", [("M", 8), ("M", 8)], {"axis": 0}, "tokens cannot be concatenated"),
        ("Slice", [("M", 8), [0], [1], [0]], {}, "tokens cannot be sliced"),
        ("Loop", [("M", 8)], {}, "no shape for the ONNX operator Loop"),
        ("Reshape", [("M", 8), (2,)], {}, "must be constants"),
    ],
)
def test_what_has_no_shape_is_refused(op: str, operands: list[Any], attributes: dict[str, Any], fact: str) -> None:
    node, _ = node_of(op, operands, attributes)
    with pytest.raises(LlmcError, match=fact):
        infer(node)

"""The graph as text: what goldens hold and `--dump` writes.

    graph(%tokens: i64[M], %positions: i64[M])
    %0 = Gather(model.embed_tokens.weight[32000,4096], %tokens) : f32[M,4096]
    %1, %2 = llmc.AddRMSNorm(%0, %9, model.norm.weight[4096], epsilon=1e-05) : f32[M,4096], f32[M,4096]
    return %logits: f32[R,32000]

One node a line. Values are numbered in order, whatever they are called; inputs and results of the graph keep their
names. A weight stands by its name and shape, a constant of few numbers by its value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.weights import Weight

FEW = 8
"""Constants of at most this many elements are written out."""

DTYPES = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "f64",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.BOOL: "bool",
}


def op_name(node: ir.Node) -> str:
    """ "llmc.Linear" for our operators, "Gather" for standard ones."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def to_text(model: ir.Model) -> str:
    """The whole graph; see the module's docstring. Equal graphs give equal text."""
    graph = model.graph
    names: dict[ir.Value, str] = {value: f"%{value.name}" for value in graph.inputs}
    results = {value for value in graph.outputs if value not in names}
    for node in graph:
        for value in node.outputs:
            names[value] = f"%{value.name}" if value in results else f"%{len(names) - len(graph.inputs)}"
    lines = [f"graph({', '.join(f'{names[value]}: {type_text(value)}' for value in graph.inputs)})"]
    lines += [node_text(node, names) for node in graph]
    lines.append(
        f"return {', '.join(f'{names.get(value, value.name)}: {type_text(value)}' for value in graph.outputs)}"
    )
    return "\n".join(lines)


def node_text(node: ir.Node, names: dict[ir.Value, str]) -> str:
    operands = [operand_text(value, names) for value in node.inputs]
    while operands and operands[-1] == "_":
        operands.pop()
    settings = [f"{name}={attribute_text(attribute)}" for name, attribute in sorted(node.attributes.items())]
    left = ", ".join(names[value] for value in node.outputs)
    types = ", ".join(type_text(value) for value in node.outputs)
    return f"{left} = {op_name(node)}({', '.join(operands + settings)}) : {types}"


def operand_text(value: ir.Value | None, names: dict[ir.Value, str]) -> str:
    if value is None:
        return "_"
    tensor = value.const_value
    if value in names or tensor is None:
        return names.get(value, f"%{value.name}")
    if tensor.size <= FEW and not isinstance(tensor, Weight):
        return number_text(tensor.numpy())
    return f"{value.name}[{','.join(map(str, tensor.shape))}]"


def number_text(array: np.ndarray[Any, Any]) -> str:
    """A scalar as a number, a vector as a list."""
    numbers = [str(number) for number in array.reshape(-1)]
    return numbers[0] if array.ndim == 0 else f"[{', '.join(numbers)}]"


def attribute_text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.FLOAT:
        return str(np.float32(attribute.value))
    if attribute.type == ir.AttributeType.TENSOR:
        return number_text(attribute.as_tensor().numpy())
    if attribute.type == ir.AttributeType.INTS:
        return f"[{', '.join(map(str, attribute.as_ints()))}]"
    return str(attribute.value)


def type_text(value: ir.Value) -> str:
    """f32[M,4096]; a question mark for what is not known."""
    dtype = DTYPES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "?"
    if value.shape is None:
        return f"{dtype}?"
    return f"{dtype}[{','.join(str(size) if isinstance(size, int) else str(size.value) for size in value.shape)}]"

"""Any standard operator that no other schedule takes, lowered by TVM's own ONNX importer: correct, but slow.

    Call -> a model of one node -> Relax -> LegalizeOps, FuseOps, FuseTIR -> PrimFuncs, one launch each

A launch does all its work in one task.  Buffers between and inside the PrimFuncs become temporaries, so that a kernel
allocates nothing.  Inputs that an operator needs as numbers (axes, shapes, sizes: call attribute "input.<index>") are
constants of the model.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from llmc.compiler.kernel import Call, DType, Implementation, Kernel, Launch, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.rule import Rule

OPSET, IR_VERSION = 23, 10
ELEMENT_TYPES: dict[DType, int] = {
    "f32": onnx.TensorProto.FLOAT,
    "bf16": onnx.TensorProto.FLOAT,  # constants stored in fewer bits are widened when they are packed
    "f16": onnx.TensorProto.FLOAT,
    "i32": onnx.TensorProto.INT32,
    "i64": onnx.TensorProto.INT64,
    "i8": onnx.TensorProto.INT8,
    "u8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}


@dataclass(frozen=True)
class OneNode:
    """The whole call as a model of one node; nothing to tune."""

    def __str__(self) -> str:
        return "TVM's own lowering"


def match(call: Call, target: Target) -> OneNode:
    return OneNode()


def implement(call: Call, params: OneNode, target: Target) -> Implementation:
    """Raises LlmcError when TVM cannot import the operator or has no loops for it."""
    lowered = lower_call(call)
    launches = []
    for index, step in enumerate(lowered.steps):
        key = f"build_step({call}, {call.attributes!r}, {index})"
        name = f"{re.sub('[^a-z0-9]+', '_', call.op.lower())}_{short_hash(key)}_{index}"
        launches.append(Launch(Kernel(name, key, partial(build_step, call, index)), step.operands))
    narrow = {i: x for i, x in enumerate(call.inputs) if x and x.constant and x.dtype in ("bf16", "f16")}
    return Implementation(tuple(launches), lowered.temps, layouts={index: RowMajor("f32") for index in narrow})


def build_step(call: Call, index: int) -> Any:
    """The PrimFunc of one launch."""
    from llmc.schedules.lower import LOOSE

    return lower_call(call).steps[index].function.with_attr(LOOSE, True)


def settings(call: Call) -> dict[int, Any]:
    """Inputs whose values the call carries, by index."""
    values = {index: call.attribute(f"input.{index}") for index in range(len(call.inputs))}
    return {index: value for index, value in values.items() if value is not None}


def one_node_model(call: Call) -> onnx.ModelProto:
    """The call as an ONNX model: inputs i0, i1, … and results o0, o1, …; settings are initializers.

    Token ids and positions are int64 in the graph and int32 at run time: where ONNX wants int64, they are cast.
    """
    for ids in ("int32", "int64"):
        model = _model(call, ids)
        try:
            onnx.checker.check_model(model, full_check=True)
        except Exception as error:
            problem = error
        else:
            return model
    raise LlmcError(f"{call.op} is not a valid ONNX node: {_first_line(problem)}", place=f"node {call}")


def _model(call: Call, ids: str) -> onnx.ModelProto:
    constants, graph_inputs, names, nodes = [], [], [], []
    values = settings(call)
    for index, value in enumerate(call.inputs):
        name = f"i{index}" if value is not None else ""
        if value is not None and index in values:
            dtype = np.int32 if value.dtype == "i32" else np.int64
            constants.append(onnx.numpy_helper.from_array(np.array(values[index], dtype).reshape(value.shape), name))
        elif value is not None:
            graph_inputs.append(onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[value.dtype], value.shape))
            if value.dtype == "i32" and ids == "int64":
                nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}_64"], to=onnx.TensorProto.INT64))
                name = f"{name}_64"
        names.append(name)
    results = [
        onnx.helper.make_tensor_value_info(f"o{index}", ELEMENT_TYPES[value.dtype], value.shape)
        for index, value in enumerate(call.outputs)
    ]
    attributes = {name: value for name, value in call.attributes if not name.startswith("input.")}
    attributes = {name: list(value) if isinstance(value, tuple) else value for name, value in attributes.items()}
    domain, _, operator = call.op.rpartition(".")
    outputs = [result.name for result in results]
    nodes.append(onnx.helper.make_node(operator, names, outputs, name=call.op, domain=domain, **attributes))
    graph = onnx.helper.make_graph(nodes, "call", graph_inputs, results, constants)
    imports = [onnx.helper.make_opsetid("", OPSET)] + ([onnx.helper.make_opsetid(domain, 1)] if domain else [])
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


@dataclass(frozen=True)
class Step:
    """One launch: a PrimFunc and what its buffers are."""

    function: Any
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Lowered:
    steps: tuple[Step, ...]
    temps: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def lower_call(call: Call) -> Lowered:
    """The call as PrimFuncs over its operands and temporaries."""
    if "." in call.op:
        hint = "only operators of the ONNX standard have a general lowering"
        raise LlmcError(f"no schedule takes {call.op} with these shapes and attributes", place=str(call), hint=hint)
    model = one_node_model(call)
    from llmc.schedules.fallback_lower import Lowering  # TVM is imported only when it is needed

    inputs = [f"i{index}" for index in range(len(call.inputs))]
    try:
        lowering = Lowering(model, {name: index for index, name in enumerate(inputs)}, len(call.outputs))
    except LlmcError as error:
        raise LlmcError(f"{call.op} cannot be compiled: {error.fact}", place=str(call), hint=error.hint) from error
    except Exception as error:
        raise LlmcError(f"{call.op} cannot be imported: {_first_line(error)}", place=str(call)) from error
    return Lowered(tuple(Step(function, operands) for function, operands in lowering.steps), tuple(lowering.temps))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


RULES = (Rule("fallback", match, implement),)

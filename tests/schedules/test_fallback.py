"""Standard operators through TVM's own lowering, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import fallback
from llmc.schedules.execute import Executable

Array = np.ndarray[Any, Any]


def real(*shape: int) -> TensorType:
    return TensorType(shape, "f32")


def typed(dtype: DType, *shape: int, constant: bool = False) -> TensorType:
    return TensorType(shape, dtype, constant)


def node(op: str, inputs: list[Any], outputs: list[TensorType], **attributes: Any) -> Call:
    """A call; inputs that are tuples of integers are settings."""
    types = []
    for index, value in enumerate(inputs):
        if isinstance(value, tuple):
            attributes[f"input.{index}"] = value
            value = TensorType((len(value),), "i64", constant=True)
        types.append(value)
    return Call(op, tuple(types), tuple(outputs), tuple(sorted(attributes.items())))


CALLS = [
    node("Softplus", [real(4, 100)], [real(4, 100)]),
    node("Softmax", [real(4, 100)], [real(4, 100)], axis=-1),
    node("Gemm", [real(4, 30), typed("bf16", 50, 30, constant=True), real(50)], [real(4, 50)], transB=1),
    node("MatMul", [real(2, 4, 30), real(30, 50)], [real(2, 4, 50)]),
    node("Concat", [real(4, 100), real(4, 20), real(4, 1)], [real(4, 121)], axis=-1),
    node("Split", [real(4, 100), (40, 60)], [real(4, 40), real(4, 60)], axis=1),
    node("Slice", [real(4, 100), (10,), (30,), (1,), (2,)], [real(4, 10)]),
    node("Transpose", [real(4, 10, 3)], [real(3, 4, 10)], perm=(2, 0, 1)),
    node("Erf", [real(4, 100)], [real(4, 100)]),
    node("Pow", [real(4, 100), real()], [real(4, 100)]),
    node("ReduceMean", [real(4, 100), (-1,)], [real(4, 1)], keepdims=1),
    node("Where", [typed("bool", 4, 1), real(4, 100), real(100)], [real(4, 100)]),
    node("Cast", [typed("i64", 4, 10)], [real(4, 10)], to=1),
    node("Clip", [real(4, 100), real(), None], [real(4, 100)]),
    node("Greater", [real(4, 3), real(3)], [typed("bool", 4, 3)]),
    node("Expand", [real(4, 1), (4, 3)], [real(4, 3)]),
    node("Gather", [real(4, 10), (2, 0, 5)], [real(4, 3)], axis=1),
    node("Add", [typed("i32", 4), (2,)], [typed("i64", 4)]),
    node("Identity", [real(4, 3)], [real(4, 3)]),
    node("LayerNormalization", [real(2, 3, 4), real(3, 4)], [real(2, 3, 4)], axis=1),
    node("TopK", [real(4, 30), (5,)], [real(4, 5), typed("i64", 4, 5)]),
    node("TopK", [real(4, 3, 2), (2,)], [real(4, 2, 2), typed("i64", 4, 2, 2)], axis=1, largest=0),
    node("CumSum", [real(4, 30), (1,)], [real(4, 30)]),
    node("Conv", [real(1, 3, 10, 10), real(4, 3, 3, 3)], [real(1, 4, 8, 8)]),
]


def random_inputs(call: Call) -> list[Array | None]:
    generator = np.random.default_rng(0)
    inputs: list[Array | None] = []
    for index, kind in enumerate(call.inputs):
        if kind is None:
            inputs.append(None)
        elif index in fallback.settings(call):
            inputs.append(np.array(fallback.settings(call)[index], np.int64).reshape(kind.shape))
        else:
            values = generator.uniform(0.5, 2.0, kind.shape) * (1 if kind.dtype[0] in "bf" else 3)
            inputs.append(np.asarray(values > 1.2 if kind.dtype == "bool" else values, numpy_dtype(kind.dtype)))
    return inputs


def defined(call: Call, inputs: list[Array | None]) -> list[Array]:
    model: Any = fallback.one_node_model(call)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feeds = {}
    for value in session.get_inputs():
        array = inputs[int(value.name.removeprefix("i"))]
        assert array is not None
        feeds[value.name] = np.asarray(array, np.float32) if value.type == "tensor(float)" else array
    return [np.asarray(result) for result in session.run(None, feeds)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.op)
def test_an_operator_gives_what_onnx_runtime_gives(call: Call, host: Target) -> None:
    executable = Executable(call, fallback.implement(call, fallback.OneNode(), host), host)
    inputs = random_inputs(call)
    assert all(launch.grid == 1 for launch in executable.implementation.launches)
    for result, expected in zip(executable.run(*inputs), defined(call, inputs), strict=True):
        assert result.dtype == expected.dtype
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "fact"),
    [
        (node("NonZero", [real(4)], [typed("i64", 1, 4)]), "NonZero cannot be compiled: TVM has no loops"),
        (node("Nonsense", [real(4)], [real(4)]), "not a valid ONNX node"),
        (node("llmc.PagedAttention", [real(4)], [real(4)]), "no schedule takes llmc.PagedAttention"),
        (node("Add", [real(4), typed("i64", 4)], [real(4)]), "not a valid ONNX node"),
    ],
    ids=lambda value: value.op if isinstance(value, Call) else "",
)
def test_what_cannot_be_compiled_is_named_with_what_is_missing(call: Call, fact: str, host: Target) -> None:
    with pytest.raises(LlmcError, match=fact) as caught:
        fallback.implement(call, fallback.OneNode(), host)
    assert call.op in str(caught.value)

"""Running kernels on NumPy arrays, on every level of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc import schedules
from llmc.compiler.graph import run as graph_run
from llmc.compiler.kernel import Call, numpy_dtype
from llmc.compiler.ops import OPSET
from llmc.compiler.target import LEVELS, Target, host_features
from llmc.schedules.execute import Executable

LEVELS_HERE = [level for level, features in LEVELS.items() if host_features().issuperset(features)]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Array]]:
    """run(call, *inputs, target=…, n_tasks=…, kv=…): the call's outputs; each call is compiled once."""
    loaded: dict[tuple[Call, Target], Executable] = {}

    def execute(call: Call, *inputs: Array | None, target: Target, **options: Any) -> list[Array]:
        if (call, target) not in loaded:
            loaded[call, target] = Executable(call, schedules.implement(call, target), target)
        return loaded[call, target].run(*inputs, **options)

    return execute


@pytest.fixture(params=LEVELS_HERE)
def target(request: pytest.FixtureRequest) -> Target:
    """Each level that this machine can run."""
    return Target("cpu", request.param)


@pytest.fixture
def host() -> Target:
    """The highest level of this machine."""
    return Target("cpu", LEVELS_HERE[-1])


@pytest.fixture(scope="session")
def define() -> Callable[..., list[Array]]:
    """define(call, *inputs): what the call's operator is by definition, computed by ONNX Runtime in float32."""

    def evaluate(call: Call, *inputs: Array | None) -> list[Array]:
        arrays = [None if x is None else x if x.dtype.kind in "ib" else np.asarray(x, np.float32) for x in inputs]
        types = [None if x is None else ir.TensorType(ir.DataType.from_numpy(x.dtype)) for x in arrays]
        values = [
            None if x is None else ir.Value(name=f"i{i}", type=types[i], shape=ir.Shape(x.shape))
            for i, x in enumerate(arrays)
        ]
        domain, _, name = call.op.rpartition(".")
        attributes = {key: value for key, value in call.attributes if not key.startswith("input.")}
        node = ir.Node(
            domain, name, values, ir.convenience.convert_attributes(attributes), num_outputs=len(call.outputs)
        )
        for i, (result, kind) in enumerate(zip(node.outputs, call.outputs, strict=True)):
            result.name, result.shape = f"o{i}", ir.Shape(kind.shape)
            result.type = ir.TensorType(ir.DataType.from_numpy(numpy_dtype(kind.dtype)))
        present = [value for value in values if value is not None]
        graph = ir.Graph(present, node.outputs, nodes=[node], opset_imports={"": OPSET, "llmc": 1})
        results = graph_run.evaluate(
            ir.Model(graph, ir_version=10), {f"i{i}": x for i, x in enumerate(arrays) if x is not None}
        )
        return [results[f"o{i}"] for i in range(len(call.outputs))]

    return evaluate

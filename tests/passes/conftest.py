"""What the tests of passes share: a graph written node by node, and the checks that every rewrite must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph, ops
from llmc.compiler.graph.shapes import infer
from llmc.compiler.weights import Weight

Array: TypeAlias = np.ndarray[Any, Any]
SIZES = {
    "M": 6,
    "batch": 1,
    "batch*4": 4,
    "3*M": 18,
    "4*batch*sequence": 24,
    "sequence": 6,
    "R": 2,
    "P": 2,
    "n_pages": 5,
    "n_slots": 3,
}


class Build:
    """A graph, node by node: `b = Build(); x = b.input("x", "M", 8); model = b.model(b.op("Relu", x))`."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.random = np.random.default_rng(0)

    def input(self, name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def sequence_inputs(self) -> tuple[ir.Value, ir.Value]:
        """input_ids and position_ids [batch, sequence]."""
        return tuple(self.input(n, "batch", "sequence", dtype=ir.DataType.INT64) for n in ("input_ids", "position_ids"))  # type: ignore[return-value]

    def token_inputs(self) -> tuple[ir.Value, ir.Value]:
        """tokens and positions [M]."""
        return tuple(self.input(n, "M", dtype=ir.DataType.INT64) for n in ("tokens", "positions"))  # type: ignore[return-value]

    def weight(self, name: str, *shape: int) -> ir.Value:
        """A weight with random values; the same for the same name and shape."""
        random = np.random.default_rng([*name.encode(), *shape])
        return self.constant(Weight.of_array(name, random.normal(0, 0.3, shape).astype(np.float32)), name)

    def constant(self, tensor: ir.TensorProtocol | Sequence[int] | float, name: str | None = None) -> ir.Value:
        """A tensor; a list is a vector of int64, a number a float32 scalar."""
        if isinstance(tensor, list | tuple):
            tensor = ir.tensor(np.array(tensor, dtype=np.int64))
        elif isinstance(tensor, float):
            tensor = ir.tensor(np.array(tensor, dtype=np.float32))
        assert isinstance(tensor, ir.TensorProtocol)
        name = name or f"constant.{len(self.initializers)}"
        tensor.name = name
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def op(self, op: str, *inputs: ir.Value | None, shape: Sequence[int | str] | None = None, **attributes: Any) -> Any:
        """One node; a tuple of results where there are several. `shape` where it cannot be inferred."""
        n_results = attributes.pop("n_results", 1)
        metadata = attributes.pop("metadata", {})
        domain, _, op_type = op.rpartition(".")
        converted = [ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        node = ir.Node(domain, op_type, inputs, converted, num_outputs=n_results, metadata_props=metadata)
        self.nodes.append(node)
        for i, value in enumerate(node.outputs):
            value.name = f"{op_type.lower()}_{len(self.nodes)}_{i}"
        if shape is None:
            infer(node)
        else:
            node.outputs[0].shape = ir.Shape(shape)
            assert inputs[0] is not None
            assert inputs[0].dtype is not None
            node.outputs[0].dtype = inputs[0].dtype
        return node.outputs[0] if n_results == 1 else tuple(node.outputs)

    def model(self, *outputs: ir.Value) -> ir.Model:
        if len(outputs) == 1:
            outputs[0].name = "logits"
        imports = {"": ops.OPSET, ops.DOMAIN: ops.VERSION}
        return ir.Model(
            ir.Graph(
                self.inputs,
                outputs,
                nodes=self.nodes,
                initializers=self.initializers,
                opset_imports=imports,
                name="test",
            ),
            ir_version=10,
        )


@pytest.fixture
def build() -> Build:
    return Build()


def feeds_for(model: ir.Model) -> dict[str, Array]:
    """Random inputs of the graph's shapes; sequences of tokens are the same whatever the graph calls them."""
    random = np.random.default_rng(1)
    length = SIZES["M"]
    tokens, positions = random.integers(0, 11, length), np.arange(length)
    feeds: dict[str, Array] = {"tokens": tokens, "positions": positions, "rows": np.arange(SIZES["R"])}
    feeds |= {"input_ids": tokens[None], "position_ids": positions[None]}
    feeds["page_table"] = np.tile([3, 1], (length, 1))
    feeds["slots"] = np.full(length, 1)
    feeds["adapters"] = np.full(length, -1)
    feeds["sees"] = positions
    turns = np.stack([positions, positions // 2, positions % 3], axis=-1)
    feeds["turns"] = turns[None] if any(value.name == "input_ids" for value in model.graph.inputs) else turns
    feeds["is_given"] = np.zeros(length, np.int64)
    for value in model.graph.inputs:
        if value.name not in feeds:
            shape = graph.bind(model, SIZES)[value]
            feeds[str(value.name)] = random.normal(size=shape).astype(np.float32)
    return feeds


@pytest.fixture
def feeds() -> Callable[[ir.Model], dict[str, Array]]:
    """feeds(model): random inputs for it."""
    return feeds_for


@pytest.fixture
def check(golden: Callable[[object], None]) -> Callable[..., None]:
    """Run a pass and hold it to what every pass promises: the golden text, the same results in ONNX Runtime, a shape
    on every value, nothing left to do the second time."""

    def run(model: ir.Model, rewrite: Callable[[ir.Model], int], n_rewrites: int, tolerance: float = 2e-6) -> None:
        feeds, before, name = feeds_for(model), graph.to_text(model), getattr(rewrite, "__name__", "rewrite")
        wanted = list(graph.evaluate(model, feeds).values())
        assert rewrite(model) == n_rewrites
        after = graph.to_text(model)
        golden(f"{before}\n\n// {name}\n\n{after}")
        assert "?" not in after
        assert "None" not in after
        found = list(graph.evaluate(model, feeds | feeds_for(model)).values())
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b.reshape(a.shape), a, rtol=0, atol=tolerance * max(1.0, float(np.abs(a).max())))
        assert rewrite(model) == 0
        assert graph.to_text(model) == after

    return run


@pytest.fixture
def refused() -> Callable[..., None]:
    """A pass leaves the graph as it is."""

    def run(model: ir.Model, rewrite: Callable[[ir.Model], int]) -> None:
        before = graph.to_text(model)
        assert rewrite(model) == 0
        assert graph.to_text(model) == before

    return run

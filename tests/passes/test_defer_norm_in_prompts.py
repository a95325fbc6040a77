"""passes/defer_norm_in_prompts.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.weights import Weight
from llmc.passes.append_in_product import append_in_product
from llmc.passes.defer_norm import defer_norm
from llmc.passes.defer_norm_in_prompts import defer_norm_in_prompts
from tests.passes.conftest import feeds_for
from tests.passes.test_append_in_product import KH, D, H, attention, model_of


def stored(build: Any, name: str, n: int, k: int, dtype: Any = "bf16") -> Any:
    array = np.random.default_rng(n).normal(0, 0.3, (n, k)).astype(np.float32)
    return build.constant(Weight.of_array(name, array).stored_as(dtype), name)


def deferred(build: Any, bias: bool = False, norm: str = "RMSNorm", n: int = 24, dtype: Any = "bf16") -> Any:
    """A product, a residual, and the product behind their norm, before any norm is deferred."""
    x, residual = build.input("x", "M", 16), build.input("residual", "M", 64)
    biases = [build.weight("c", 64)] * bias
    name = f"llmc.Linear{'Bias' * bias}Residual"
    y = build.op(name, x, stored(build, "W", 64, 16, dtype), *biases, residual)
    vectors = [build.weight("g", 64)] + [build.weight("b", 64)] * (norm == "LayerNorm")
    return build.op(f"llmc.{norm}Linear", y, *vectors, stored(build, "V", n, 64, dtype), epsilon=1e-5)


def in_decode(model: ir.Model) -> ir.Model:
    """The step graph, whose norms are deferred in steps of few tokens."""
    assert defer_norm(model) == 1
    for index, node in enumerate(model.graph):
        node.name = f"{index}.{node.op_type}"
    return model


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_the_product_in_front_makes_moments_of_a_tile(build: Any, check: Any, norm: str) -> None:
    model = in_decode(build.model(deferred(build, norm == "LayerNorm", norm)))
    names = [node.name for node in model.graph]
    check(model, defer_norm_in_prompts, 1)
    assert [node.name for node in model.graph] == names
    (moments,) = [value for node in model.graph for value in node.outputs[2:3]]
    assert [str(size) for size in moments.shape or ()] == ["1", "M", "2"]


def test_moments_with_another_reader_and_other_dtypes_are_left(build: Any, refused: Any) -> None:
    model = in_decode(build.model(deferred(build)))
    moments = next(node.outputs[2] for node in model.graph if len(node.outputs) == 3)
    other = build.op("Relu", moments)
    model.graph.append(other.producer())
    model.graph.outputs.append(other)
    refused(model, defer_norm_in_prompts)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_only_bfloat16_has_the_range(build: Any, refused: Any, dtype: str) -> None:
    refused(in_decode(build.model(deferred(build, dtype=dtype))), defer_norm_in_prompts)


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_a_product_that_appends_applies_the_norm_too(build: Any, norm: str) -> None:
    """The same numbers as by one after the other, in the order in which plans have both."""
    model = in_decode(model_of(build, attention(build, deferred(build, norm=norm, n=(H + 2 * KH) * D))))
    feeds = feeds_for(model)
    wanted = graph.evaluate(model, feeds)
    assert defer_norm_in_prompts(model) == 1
    assert append_in_product(model, kv_dtype="bf16") == 1
    assert graph.count_ops(model)[f"llmc.Deferred{norm}LinearRotaryAppend"] == 1
    for key, found in graph.evaluate(model, feeds).items():
        np.testing.assert_allclose(found, wanted[key], rtol=0, atol=5e-6)

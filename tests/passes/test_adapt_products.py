"""passes/adapt_products.py"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.low_rank import Added, Factors
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.weights import Array, Weight
from llmc.passes.adapt_products import adapt_products
from llmc.runtime.errors import LlmcError
from tests.passes.test_insert_adapters import added_to, each_alone, values

N = 64
SHAPES = {"gu": (2 * N, N), "down": (N, N), "next": (40, N), "head": (5, 40)}


class Layer:
    """A gated MLP behind a norm, a residual, and the product behind the next norm, which the first one prepares.

    dtype: of the weights.  later: whether the residual is wanted once more.  weights: gives those that are taken, by
    name and from those that are drawn."""

    def __init__(self, build: Any, weights: Callable[[str, Array], Array], dtype: Any = "bf16", later: bool = False):
        self.build, self.weights, self.dtype = build, weights, dtype
        x, rows = build.input("x", "M", N), build.input("rows", "R", dtype=ir.DataType.INT64)
        h, vectors = build.op("Tanh", x), [build.weight(name, N) for name in ("g", "g2", "b2")]
        inner = build.op("llmc.RMSNormGatedLinearSilu", h, vectors[0], self.weight("gu"), epsilon=1e-5)
        made = build.op("llmc.LinearResidualMoments", inner, self.weight("down"), h, vectors[1], n_results=3)
        y, scaled, moments = made
        z = build.op("llmc.DeferredRMSNormLinear", y, vectors[1], self.weight("next"), scaled, moments, epsilon=1e-5)
        z = build.op("Add", z, build.op("llmc.Linear", h, build.weight("plain", 40, N))) if later else z
        picked = build.op("Gather", z, rows, axis=0)
        self.model: ir.Model = build.model(build.op("llmc.Linear", picked, self.weight("head")))

    def weight(self, name: str) -> ir.Value:
        array = self.weights(f"{name}.weight", values(f"{name}.weight", *SHAPES[name]))
        value: ir.Value = self.build.constant(
            Weight.of_array(f"{name}.weight", array).stored_as(self.dtype), f"{name}.weight"
        )
        return value


def as_drawn(_: str, array: Array) -> Array:
    return array


def added(*names: str) -> Added:
    return added_to(**{name: SHAPES[name] for name in names})


def adapting(added: Added) -> Any:
    rewrite = partial(adapt_products, added=added)
    rewrite.__name__ = "adapt_products"  # type: ignore[attr-defined]
    return rewrite


def test_products_keep_the_norms_beside_them(build: Any, check: Any) -> None:
    check(Layer(build, as_drawn).model, adapting(added("gu", "down", "next")), 3)


def test_a_residual_that_is_wanted_later_stays_as_it_is(build: Any, check: Any) -> None:
    check(Layer(build, as_drawn, later=True).model, adapting(added("down")), 1)


def all_rows(model: ir.Model, feeds: Callable[[ir.Model], dict[str, Any]]) -> dict[str, Any]:
    return feeds(model) | {"rows": np.arange(6)}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("later", [False, True])
def test_each_token_has_what_its_own_adapter_makes_of_the_weights(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]], dtype: Literal["f32", "bf16"], later: bool
) -> None:
    """In bf16, where a gate's columns lie in strips, matrices and weights are rounded, and what is added is not."""
    changes = added("gu", "down", "next")
    model = Layer(build, as_drawn, dtype, later).model
    assert adapt_products(model, added=changes) == 3
    assert any("Strips" in node.op_type for node in model.graph) == (dtype == "bf16")
    adapters = np.array([0, 1, -1, 0, -1, 1])
    (found,) = graph.evaluate(model, all_rows(model, feeds) | {"adapters": adapters}).values()

    def rounded(weight: Weight) -> Weight:
        return Weight.of_array(str(weight.name), weight.stored_as(dtype).numpy())

    def merged(weights: Callable[[str, Array], Array]) -> ir.Model:
        def of_rounded(name: str, array: Array) -> Array:
            return weights(name, rounded(Weight.of_array(name, array)).numpy())

        return Layer(type(build)(), of_rounded, "f32", later).model

    as_kept = {
        name: [each and Factors(rounded(each.a), rounded(each.b)) for each in parts] for name, parts in changes.items()
    }
    wanted = each_alone(merged, as_kept, lambda model: all_rows(model, feeds))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


def test_an_activation_comes_behind_what_is_added(build: Any, check: Any) -> None:
    x = build.input("x", "M", N)
    residual = build.op("Tanh", build.input("r", "M", 40))
    y = build.op("llmc.LinearBiasReluResidual", x, build.weight("next.weight", 40, N), build.weight("c", 40), residual)
    check(build.model(build.op("Relu", y)), adapting(added("next")), 1)


@pytest.mark.parametrize("activation", ["Gelu", "GeluTanh", "Silu"])
def test_every_activation_is_there_by_itself(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]], activation: str
) -> None:
    x = build.input("x", "M", N)
    model = build.model(build.op(f"llmc.Linear{activation}", x, build.weight("next.weight", 40, N)))
    given = feeds(model)
    (wanted,) = graph.evaluate(model, given).values()
    assert adapt_products(model, added=added("next")) == 1
    (found,) = graph.evaluate(model, given | feeds(model)).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_codes_are_known_by_the_weight_they_are_of(build: Any) -> None:
    x, weight = build.input("x", "M", N), Weight.of_array("down.weight", values("down.weight", N, N))
    scheme = Scheme.parse("int8")
    assert scheme is not None
    codes = build.constant(QuantizedWeight(weight.stored_as("bf16"), scheme), "codes")
    model = build.model(build.op("Relu", build.op("llmc.Linear", x, codes)))
    assert adapt_products(model, added=added("down")) == 1
    assert [node.op_type for node in model.graph] == ["Linear", "LowRank", "Relu"]


@pytest.mark.parametrize(("name", "fact"), [("head", "makes the logits"), ("gu", "no linear layer of its own")])
def test_what_is_no_product_of_its_own_is_refused(build: Any, name: str, fact: str) -> None:
    rows = build.input("rows", "R", dtype=ir.DataType.INT64)
    picked = build.op("Gather", build.input("x", "M", 40), rows, axis=0)
    model = build.model(build.op("llmc.Linear", picked, build.weight("head.weight", 5, 40)))
    with pytest.raises(LlmcError, match=fact):
        adapt_products(model, added=added(name))

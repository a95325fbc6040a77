"""passes/insert_adapters.py"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.low_rank import Added, Factors
from llmc.compiler.weights import Array, Weight
from llmc.passes.form_linear import form_linear
from llmc.passes.insert_adapters import insert_adapters
from llmc.passes.merge_gate_up import merge_gate_up
from llmc.passes.order_columns import ordered
from llmc.runtime.errors import LlmcError

ADAPTERS = np.array([0, 1, -1, 0, -1, 1])
"""Of six tokens."""


def factors(name: str, rank: int, n_out: int, n_in: int) -> Factors:
    random = np.random.default_rng([*name.encode(), rank])
    a, b = random.normal(size=(rank, n_in)), random.normal(size=(n_out, rank))
    return Factors(*(Weight.of_array(name, each.astype(np.float32)) for each in (a, b)))


def added_to(**shapes: tuple[int, int]) -> Added:
    """Of two adapters, the first of rank 2 and the second of rank 3."""
    return {f"{name}.weight": [factors(name, rank, *shape) for rank in (2, 3)] for name, shape in shapes.items()}


def changed(weight: Array, each: Factors | None) -> Array:
    return weight if each is None else weight + each.b.unrounded() @ each.a.unrounded()


def each_alone(
    model: Callable[[Callable[[str, Array], Array]], ir.Model],
    added: Added,
    feeds: Callable[[ir.Model], dict[str, Any]],
) -> Array:
    """What a model whose weights are changed gives for the tokens of each adapter."""
    rows = np.empty(0)
    for adapter in (-1, 0, 1):

        def weights(name: str, array: Array, adapter: int = adapter) -> Array:
            return changed(array, added[name][adapter]) if adapter >= 0 and name in added else array

        merged = model(weights)
        (found,) = graph.evaluate(merged, feeds(merged)).values()
        rows = found if adapter < 0 else np.where(np.equal(ADAPTERS, adapter)[:, None], found, rows)
    return rows


def values(name: str, *shape: int) -> Array:
    return np.random.default_rng([*name.encode(), *shape]).normal(0, 0.3, shape).astype(np.float32)


def gated(build: Any, weights: Callable[[str, Array], Array]) -> ir.Model:
    """A gated MLP, joined, and the product behind it."""
    x = build.input("x", "M", 8)
    shapes = {"gate": (6, 8), "up": (6, 8), "down": (8, 6), "head": (5, 8)}
    arrays = {f"{name}.weight": values(name, *shape) for name, shape in shapes.items()}
    made = {
        name.removesuffix(".weight"): build.constant(Weight.of_array(name, weights(name, array)), name)
        for name, array in arrays.items()
    }
    gate, up = (build.op("llmc.Linear", x, made[name]) for name in ("gate", "up"))
    inner = build.op("Mul", build.op("llmc.Silu", gate), up)
    down = build.op("Add", x, build.op("llmc.Linear", inner, made["down"]))
    model: ir.Model = build.model(build.op("llmc.Linear", down, made["head"]))
    merge_gate_up(model)
    return model


def test_products_of_tokens_without_an_adapter_stay(build: Any, check: Any) -> None:
    added = added_to(gate=(6, 8), up=(6, 8), down=(8, 6))
    rewrite = partial(insert_adapters, added=added)
    rewrite.__name__ = "insert_adapters"  # type: ignore[attr-defined]
    check(gated(build, lambda _, array: array), rewrite, 2)


@pytest.mark.parametrize("without", ["", "gate", "up"])
def test_each_token_has_what_its_own_adapter_makes_of_the_weights(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]], without: str
) -> None:
    shapes = {name: shape for name, shape in {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}.items() if name != without}
    added = dict(added_to(**shapes))
    added["down.weight"] = [None, added["down.weight"][1]]
    wanted = each_alone(lambda weights: gated(type(build)(), weights), added, feeds)
    model = gated(build, lambda _, array: array)
    insert_adapters(model, added=added)
    (found,) = graph.evaluate(model, feeds(model) | {"adapters": ADAPTERS}).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_a_weight_that_was_turned_or_put_in_another_order_is_known(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]]
) -> None:
    order = np.array([3, 0, 1, 2])

    def model_of(build: Any, weights: Callable[[str, Array], Array]) -> ir.Model:
        x = build.input("x", "M", 8)
        stored = weights("turned.weight", values("turned", 4, 8))
        turned = build.constant(Weight.of_array("turned.weight", np.ascontiguousarray(stored.T)), "turned.weight")
        product = build.op("MatMul", x, turned)
        model: ir.Model = build.model(build.op("llmc.Linear", build.op("Relu", product), build.weight("head", 5, 4)))
        form_linear(model)
        node = next(node for node in model.graph if node.op_type == "Linear")
        graph.replace(node.outputs[0], ordered(model.graph, node, order))
        return model

    added = added_to(turned=(4, 8))
    wanted = each_alone(lambda weights: model_of(type(build)(), weights), added, feeds)
    model = model_of(build, lambda _, array: array)
    assert insert_adapters(model, added=added) == 1
    (found,) = graph.evaluate(model, feeds(model) | {"adapters": ADAPTERS}).values()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "shape", "fact"),
    [("table", (9, 8), "no linear layer"), ("head", (5, 8), "makes the logits"), ("none", (8, 8), "no linear layer")],
)
def test_what_is_no_product_of_its_own_is_refused(build: Any, name: str, shape: tuple[int, int], fact: str) -> None:
    tokens = build.input("tokens", "M", dtype=ir.DataType.INT64)
    x = build.op("Gather", build.weight("table.weight", 9, 8), tokens, axis=0)
    model = build.model(build.op("llmc.Linear", x, build.weight("head.weight", 5, 8)))
    with pytest.raises(LlmcError, match=fact) as error:
        insert_adapters(model, added=added_to(**{name: shape}))
    assert "without a name" in str(error.value.hint)

"""passes/form_experts.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.form_experts import form_experts
from llmc.runtime.errors import LlmcError

T, E, K, N = "M", 3, 8, 5


def mixture(
    build: Any, *, k: int = 1, fill: float = -np.inf, gate: str = "Sigmoid", up_first: bool = False, axis: int = 0
) -> ir.Model:
    """As Llama 4 writes it: every token to every expert, times a score that is 0 for those that were not chosen."""
    x = build.input("x", T, K)
    logits = build.op("MatMul", x, build.weight("router", K, E))
    values, index = build.op("TopK", logits, build.constant([k]), axis=1, n_results=2)
    nothing = build.op("Expand", build.constant(fill), build.op("Shape", logits), shape=(T, E))
    scattered = build.op("ScatterElements", nothing, index, values, axis=1, shape=(T, E))
    column = build.op("Transpose", build.op("Sigmoid", scattered), perm=[1, 0])
    column = build.op("Reshape", column, build.constant([-1, 1]), shape=("3*M", 1))
    repeated = build.op("Tile", x, build.constant([E, 1]), shape=("3*M", K))
    scaled = build.op("Mul", repeated, column, shape=("3*M", K))
    apart = build.op("Reshape", scaled, build.constant([E, -1, K]), shape=(E, T, K))
    both = build.op("MatMul", apart, build.weight("gate_up", E, K, 2 * N))
    parts = build.op("Split", both, axis=2, num_outputs=2, n_results=2)
    gates, up = parts[::-1] if up_first else parts
    inner = build.op("Mul", up, build.op("Mul", gates, build.op(gate, gates)))
    results = build.op("MatMul", inner, build.weight("down", E, N, K))
    total: Any = build.op("ReduceSum", results, build.constant([axis]), keepdims=0)
    model: ir.Model = build.model(total)
    return model


def test_experts_that_are_one_product_become_one_operator(build: Any, check: Any) -> None:
    check(mixture(build), form_experts, 1)


OTHERS: list[dict[str, Any]] = [{"k": 2}, {"fill": 0.0}, {"gate": "Tanh"}, {"up_first": True}, {"axis": 1}]


@pytest.mark.parametrize("how", OTHERS, ids=str)
def test_another_mixture_that_is_one_product_is_refused_by_name(build: Any, how: dict[str, Any]) -> None:
    with pytest.raises(LlmcError, match="experts are one product for all of them") as refusal:
        form_experts(mixture(build, **how))
    assert refusal.value.place in ("weight gate_up", "weight down")

"""passes/fold_value_scale.py"""

from typing import Any

import pytest

from llmc.passes.fold_value_scale import fold_value_scale

ATTENTION = {"num_heads": 2, "kv_num_heads": 1, "scale": 1.0, "softcap": 0.0, "window": 0, "layer": 0}


def attention(build: Any, scaled: Any, kind: str = "", *, shows_values: bool = False) -> Any:
    q, k, v = build.input("q", "M", 8), build.input("k", "M", 4), scaled(build.input("v", "M", 4))
    sinks = [build.weight("sinks", 2)] if kind == "Sink" else []
    out = build.op(f"llmc.{kind}CausalAttention", q, k, v, *sinks, **ATTENTION)
    return build.model(build.op("Add", out, build.op("Concat", v, v, axis=1)) if shows_values else out)


@pytest.mark.parametrize("kind", ["", "Sink"])
def test_scale_of_values_moves_behind_attention(build: Any, check: Any, kind: str) -> None:
    check(attention(build, lambda v: build.op("Mul", v, build.constant(0.7)), kind), fold_value_scale, 1)


def test_scale_passes_through_a_reshape(build: Any, check: Any) -> None:
    def in_heads(v: Any) -> Any:
        v = build.op("Mul", build.constant(0.7), build.op("Reshape", v, build.constant([-1, 1, 4])))
        return build.op("Reshape", v, build.constant([-1, 4]))

    check(attention(build, in_heads), fold_value_scale, 1)


def test_scale_by_a_vector_is_refused(build: Any, refused: Any) -> None:
    refused(attention(build, lambda v: build.op("Mul", v, build.weight("w", 4))), fold_value_scale)


def test_scaled_values_with_another_user_are_refused(build: Any, refused: Any) -> None:
    model = attention(build, lambda v: build.op("Mul", v, build.constant(0.7)), shows_values=True)
    refused(model, fold_value_scale)

"""passes/merge_qkv.py"""

from typing import Any

from llmc.passes.merge_qkv import merge_qkv

ATTENTION = {"num_heads": 2, "kv_num_heads": 1, "scale": 0.5, "softcap": 0.0, "window": 0, "layer": 0}
SIZES = {"q": 8, "k": 4, "v": 4}


def linear(build: Any, x: Any, name: Any, bias: Any = False) -> Any:
    inputs = [x, build.weight(f"layers.0.{name}_proj.weight", SIZES[name], 8)]
    if bias:
        inputs.append(build.weight(f"layers.0.{name}_proj.bias", SIZES[name]))
    return build.op("llmc.LinearBias" if bias else "llmc.Linear", *inputs)


def attention(build: Any, q: Any, k: Any, v: Any) -> Any:
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION))


def test_three_products_become_one(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    check(attention(build, *(linear(build, x, name) for name in "qkv")), merge_qkv, 1)


def test_biases_are_joined(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    check(attention(build, *(linear(build, x, name, bias=True) for name in "qkv")), merge_qkv, 1)


def test_missing_bias_is_zero(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    check(attention(build, *(linear(build, x, name, bias=name != "k") for name in "qkv")), merge_qkv, 1)


def test_norm_and_rotary_stand_between(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    q, k, v = (linear(build, x, name) for name in "qkv")
    q = build.op("Reshape", q, build.constant([-1, 2, 4]))
    q = build.op("RMSNormalization", q, build.weight("norm", 4), axis=-1)
    q = build.op("Reshape", q, build.constant([-1, 8]))
    angles = build.input("cos", "M", 2), build.input("sin", "M", 2)
    q = build.op("llmc.Rotary", q, *angles, num_heads=2, rotary_dim=4, interleaved=0)
    k = build.op("llmc.Rotary", k, *angles, num_heads=1, rotary_dim=4, interleaved=0)
    check(attention(build, q, k, v), merge_qkv, 1)


def test_joined_weights_keep_their_stored_dtype(build: Any) -> None:
    x = build.input("x", "M", 8)
    model = attention(build, *(linear(build, x, name, bias=name == "q") for name in "qkv"))
    for value in model.graph.initializers.values():
        value.const_value.stored_dtype = "bf16"
    merge_qkv(model)
    assert {v.const_value.stored_dtype for v in model.graph.initializers.values() if v.name.startswith("layers")} == {
        "bf16"
    }


def test_products_of_different_inputs_are_refused(build: Any, refused: Any) -> None:
    x, y = build.input("x", "M", 8), build.input("y", "M", 8)
    q, k, v = linear(build, x, "q"), linear(build, y, "k"), linear(build, x, "v")
    refused(attention(build, q, k, v), merge_qkv)


def test_product_with_another_user_is_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    q, k, v = (linear(build, x, name) for name in "qkv")
    out = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
    refused(build.model(build.op("Add", out, q)), merge_qkv)


def test_keys_that_are_values_too_are_computed_once(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    q, k = linear(build, x, "q"), linear(build, x, "k")
    check(attention(build, q, k, k), merge_qkv, 1)


def test_keys_and_values_may_be_attended_twice(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    q, k, v = (linear(build, x, name) for name in "qkv")
    one = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
    check(attention(build, one, k, v), merge_qkv, 1)

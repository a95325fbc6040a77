"""passes/order_columns.py"""

from typing import Any

import pytest

from llmc.passes.order_columns import order_columns

D = 4
SETTINGS: dict[str, Any] = {"scale": 0.5, "softcap": 0.0, "window": 0, "layer": 0}


def product(build: Any, n: int, *, bias: bool = False) -> Any:
    build.token_inputs()
    operands = [build.input("h", "M", 8), build.weight("qkv.weight", n, 8)]
    return build.op("llmc.LinearBias", *operands, build.weight("qkv.bias", n)) if bias else build.op(
        "llmc.Linear", *operands
    )  # fmt: skip


def reshape(build: Any, x: Any, *sizes: int) -> Any:
    return build.op("Reshape", x, build.constant([-1, *sizes]))


def attention(build: Any, q: Any, k: Any, v: Any, n_heads: int, n_kv: int) -> Any:
    heads = {"num_heads": n_heads, "kv_num_heads": n_kv}
    return build.model(build.op("llmc.CausalAttention", q, k, v, **heads, **SETTINGS))


def rotary(build: Any, x: Any, n_heads: int) -> Any:
    names = {value.name: value for value in build.inputs}
    angles = [names.get(name) or build.input(name, "M", D // 2) for name in ("cos", "sin")]
    return build.op("llmc.Rotary", x, *angles, num_heads=n_heads, rotary_dim=D, interleaved=0)


def side_by_side(build: Any, *, bias: bool = False) -> list[Any]:
    """As BLOOM has them: [heads, 3, D]."""
    x = reshape(build, product(build, 2 * 3 * D, bias=bias), 2, 3, D)
    parts = [build.op("Gather", x, build.constant([i]), axis=2) for i in range(3)]
    return [reshape(build, part, 2 * D) for part in parts]


@pytest.mark.parametrize("bias", [False, True])
def test_heads_with_queries_keys_and_values_side_by_side(build: Any, check: Any, bias: bool) -> None:
    q, k, v = side_by_side(build, bias=bias)
    check(attention(build, rotary(build, q, 2), rotary(build, k, 2), v, 2, 2), order_columns, 1)


def test_groups_whose_keys_are_repeated_become_key_heads(build: Any, check: Any) -> None:
    """As Falcon has them: [groups, heads of one + 2, D]."""
    x = reshape(build, product(build, 2 * 4 * D), 2, 4, D)
    q = build.op("Slice", x, *(build.constant([n]) for n in (0, -2, 2, 1)))
    k, v = (build.op("Gather", x, build.constant([at]), axis=2) for at in (-2, -1))
    k, v = (build.op("Expand", part, build.constant([1, 2, 2, D])) for part in (k, v))
    q, k, v = (reshape(build, part, 4 * D) for part in (q, k, v))
    check(attention(build, rotary(build, q, 4), rotary(build, k, 4), v, 4, 4), order_columns, 1)


def test_columns_that_lie_in_order_are_cut_at_once(build: Any, check: Any) -> None:
    """As Falcon 7B has them: [heads + 2, D]."""
    x = reshape(build, product(build, 4 * D), 4, D)
    q = build.op("Slice", x, *(build.constant([n]) for n in (0, -2, 1, 1)))
    k, v = (build.op("Gather", x, build.constant([at]), axis=1) for at in (-2, -1))
    check(
        attention(build, reshape(build, q, 2 * D), reshape(build, k, D), reshape(build, v, D), 2, 1), order_columns, 1
    )


def test_what_is_split_already_is_left(build: Any, refused: Any) -> None:
    q, k, v = build.op("Split", product(build, 6 * D), build.constant([2 * D] * 3), axis=1, n_results=3)
    refused(attention(build, q, k, v, 2, 2), order_columns)


def test_columns_that_change_before_attention_are_refused(build: Any, refused: Any) -> None:
    q, k, v = side_by_side(build)
    refused(attention(build, build.op("Relu", q), k, v, 2, 2), order_columns)


def test_a_product_with_another_user_is_refused(build: Any, refused: Any) -> None:
    q, k, v = side_by_side(build)
    out = build.op("llmc.CausalAttention", q, k, v, num_heads=2, kv_num_heads=2, **SETTINGS)
    refused(build.model(build.op("Add", out, build.op("Relu", v))), order_columns)

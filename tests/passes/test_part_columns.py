"""passes/part_columns.py"""

from typing import Any

import numpy as np

from llmc.passes.part_columns import part_columns

H, D, K = 3, 4, 8


def heads(build: Any, n_parts: int, name: str = "w", bias: bool = False) -> Any:
    """[M, H, n_parts · D] of a product."""
    build.token_inputs()
    vectors = [build.weight(name, n_parts * H * D, K), *([build.weight("b", n_parts * H * D)] if bias else [])]
    product = build.op("llmc.LinearBias" if bias else "llmc.Linear", build.input("x", "M", K), *vectors)
    return build.op("Reshape", product, build.constant([-1, H, n_parts * D]))


def parts(build: Any, x: Any, n: int) -> Any:
    split = build.op("Split", x, build.constant([D] * n), axis=2, n_results=n)
    return [build.op("Reshape", part, build.constant([-1, H * D])) for part in split]


def test_queries_and_gates_of_heads_are_two_products(build: Any, check: Any) -> None:
    x = heads(build, 2, bias=True)
    query, gate = build.op("Split", x, build.constant([D, D]), axis=2, n_results=2)
    flat = build.op("Reshape", gate, build.constant([-1, H * D]))
    result = build.op("Reshape", build.op("Softmax", query, axis=-1), build.constant([-1, H * D]))
    check(build.model(build.op("Mul", result, build.op("Sigmoid", flat))), part_columns, 1)


def test_parts_that_are_put_together_again_are_one_product(build: Any, check: Any) -> None:
    q, k, gate = parts(build, heads(build, 3), 3)
    both = build.op("Concat", k, q, axis=1)
    check(build.model(build.op("Concat", build.op("Relu", both), build.op("Sigmoid", gate), axis=1)), part_columns, 1)


def test_rows_hold_what_their_part_takes(build: Any) -> None:
    """Not only as many columns: those of its own weights."""
    x = heads(build, 2)
    query, gate = parts(build, x, 2)
    model = build.model(build.op("Add", query, build.op("Sigmoid", gate)))
    whole = next(v.const_value.numpy() for v in model.graph.initializers.values() if v.name == "w")
    part_columns(model)
    found = [v.const_value.numpy() for v in model.graph.initializers.values() if v.name and v.name.startswith("w.")]
    rows = whole.reshape(H, 2, D, K)
    for wanted, each in zip((rows[:, 0], rows[:, 1]), found, strict=True):
        np.testing.assert_array_equal(each, wanted.reshape(H * D, K))


def test_parts_that_lie_one_after_the_other_stay(build: Any, refused: Any) -> None:
    build.token_inputs()
    product = build.op("llmc.Linear", build.input("x", "M", K), build.weight("w", 2 * D, K))
    a, b = build.op("Split", product, build.constant([D, D]), axis=1, n_results=2)
    refused(build.model(build.op("Mul", a, build.op("Sigmoid", b))), part_columns)


def test_a_product_that_is_taken_whole_too_stays(build: Any, refused: Any) -> None:
    x = heads(build, 2)
    query, gate = parts(build, x, 2)
    product = x.producer().inputs[0]
    refused(
        build.model(build.op("Concat", build.op("Add", query, gate), build.op("Relu", product), axis=1)), part_columns
    )


def test_columns_that_nobody_takes_stay(build: Any, refused: Any) -> None:
    query, gate, _ = parts(build, heads(build, 3), 3)
    refused(build.model(build.op("Mul", query, build.op("Sigmoid", gate))), part_columns)

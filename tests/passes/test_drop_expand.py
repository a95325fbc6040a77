"""passes/drop_expand.py"""

from typing import Any

from llmc.passes.drop_expand import drop_expand


def expanded(build: Any, *shape: int | str) -> tuple[Any, Any]:
    """x, [batch, 1, sequence], and w, [1, 8, 1], repeated for the batch."""
    ids, _ = build.sequence_inputs()
    x = build.op("Unsqueeze", build.op("Cast", ids, to=1), build.constant([1]))
    sizes = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant(list(shape)), axis=0)
    return x, build.op("Expand", build.weight("w", 1, 8, 1), sizes, shape=("batch", *shape))


def test_a_product_repeats_by_itself(build: Any, check: Any) -> None:
    x, w = expanded(build, 8, 1)
    check(build.model(build.op("MatMul", w, x)), drop_expand, 1)


def test_a_sum_repeats_by_itself(build: Any, check: Any) -> None:
    x, w = expanded(build, 8, 1)
    check(build.model(build.op("Add", x, w)), drop_expand, 1)


def test_an_expand_that_makes_the_result_larger_stays(build: Any, refused: Any) -> None:
    x, w = expanded(build, 8, 3)
    product = build.op("MatMul", build.op("Transpose", w, perm=[0, 2, 1]), build.op("Relu", w))
    refused(build.model(build.op("Mul", product, build.op("ReduceSum", x, build.constant([2])))), drop_expand)

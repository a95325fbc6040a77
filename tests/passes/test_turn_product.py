"""passes/turn_product.py"""

from typing import Any

from llmc.passes.turn_product import turn_product


def test_a_weight_on_the_left_comes_to_the_right(build: Any, check: Any) -> None:
    x = build.op("Transpose", build.input("x", "batch", "sequence", 6), perm=[0, 2, 1])
    check(build.model(build.op("MatMul", build.weight("w", 8, 6), x)), turn_product, 1)


def test_other_products_stay(build: Any, refused: Any) -> None:
    x = build.input("x", "batch", "sequence", 6)
    usual = build.op("MatMul", x, build.weight("w", 6, 8))
    of_two = build.op("MatMul", x, build.op("Transpose", x, perm=[0, 2, 1]))
    of_batches = build.op("MatMul", build.weight("table", 1, 3, 6), build.op("Transpose", x, perm=[0, 2, 1]))
    of_matrix = build.op("MatMul", build.weight("left", 8, 6), build.input("y", 6, 2))
    refused(build.model(usual, of_two, of_batches, of_matrix), turn_product)

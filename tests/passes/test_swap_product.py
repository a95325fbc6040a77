"""passes/swap_product.py"""

from typing import Any

from llmc.passes.swap_product import swap_product

SWAPPED = [0, 2, 1]


def turned(build: Any, x: Any) -> Any:
    return build.op("Transpose", x, perm=SWAPPED)


def test_streams_are_mixed_where_they_lie(build: Any, check: Any) -> None:
    streams, shares = build.input("streams", "M", 4, 24), build.input("shares", "M", 3, 4)
    mixed = build.op("MatMul", turned(build, streams), turned(build, shares))
    check(build.model(turned(build, mixed)), swap_product, 1)


def test_other_products_stay(build: Any, refused: Any) -> None:
    x, y = build.input("x", "M", 4, 8), build.input("y", "M", 8, 4)
    one = build.op("MatMul", turned(build, x), x)  # of which one operand alone lies transposed
    two = build.op("MatMul", turned(build, x), turned(build, y))  # whose result is taken as it is too
    other = build.op("Transpose", build.op("MatMul", turned(build, x), turned(build, y)), perm=[1, 0, 2])
    refused(build.model(turned(build, one), turned(build, two), two, other), swap_product)

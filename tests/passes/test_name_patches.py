"""passes/name_patches.py"""

from typing import Any

import pytest

from llmc.passes.name_patches import name_patches
from llmc.runtime.errors import LlmcError

N, R = 6, 2  # conftest's M and R


def merged(build: Any, x: Any) -> Any:
    return build.op("Reshape", x, build.constant([R, N // R * 8]))


def test_patches_and_their_rows_become_any_number(build: Any, check: Any) -> None:
    x = build.op("MatMul", build.input("pixels", N, 5), build.weight("w", 5, 8))
    check(build.model(build.op("Relu", merged(build, x))), name_patches, 4)


def test_a_weight_of_as_many_rows_is_refused(build: Any) -> None:
    x = build.op("Add", build.input("pixels", N, 8), build.weight("each", N, 8))
    with pytest.raises(LlmcError, match="name_patches: a weight has 6 or 2 rows"):
        name_patches(build.model(merged(build, x)))


def test_an_operator_that_knows_the_number_is_refused(build: Any) -> None:
    x = build.op("Expand", build.input("pixels", N, 8), build.constant([N, 8]))
    with pytest.raises(LlmcError, match="an operator knows the number of patches"):
        name_patches(build.model(merged(build, x)))


def test_a_shape_with_two_numbers_is_refused(build: Any) -> None:
    x = build.op("Reshape", build.input("pixels", N, 16), build.constant([R, N, 8]))
    y = build.op("Reshape", x, build.constant([R, N * 8]))
    with pytest.raises(LlmcError, match="a shape has two numbers of patches"):
        name_patches(build.model(y))

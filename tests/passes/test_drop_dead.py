"""passes/drop_dead.py"""

from typing import Any

import onnx_ir as ir

from llmc.passes.drop_dead import drop_dead


def test_what_changes_nothing_is_dropped(build: Any, check: Any) -> None:
    x = build.op("Identity", build.op("Relu", build.input("x", "M", 8)))
    x = build.op("Cast", build.op("Transpose", x, perm=[0, 1]), to=ir.DataType.FLOAT)
    check(build.model(build.op("Relu", build.op("Reshape", x, build.constant([-1, 8])))), drop_dead, 4)


def test_reshapes_in_a_row_become_one(build: Any, check: Any) -> None:
    x = build.op("Reshape", build.input("x", "M", 8), build.constant([-1, 2, 4]))
    check(build.model(build.op("Reshape", x, build.constant([-1, 4, 2]))), drop_dead, 1)


def test_what_nothing_uses_is_dropped(build: Any, check: Any) -> None:
    x = build.input("x", "M", 8)
    build.op("Neg", build.op("Mul", x, build.weight("unused", 8)))
    check(build.model(build.op("Relu", x)), drop_dead, 2)


def test_cast_to_another_type_is_left(build: Any, refused: Any) -> None:
    ids, _ = build.token_inputs()
    refused(build.model(build.op("Cast", ids, to=ir.DataType.FLOAT)), drop_dead)


def test_reshape_to_another_shape_is_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("Reshape", build.input("x", "M", 8), build.constant([-1, 2, 4]))), drop_dead)

"""Gather, elementwise operations and the fallback on a GPU, emulated, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda import elementwise, fallback, gather
from llmc.schedules.fallback import OneNode
from llmc.schedules.rule import Rule
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]
HOPPER = Target("cuda", "sm_90a")


def run(module: Any, call: Call, *inputs: Array | None) -> list[Array]:
    """The call by the module's first rule that takes it."""
    matches = ((rule, rule.match(call, HOPPER)) for rule in module.RULES if isinstance(rule, Rule))
    rule, params = next((rule, params) for rule, params in matches if params is not None)
    return EmulatedExecutable(call, rule.implement(call, params, HOPPER), HOPPER).run(*inputs)


def real(*shape: int) -> TensorType:
    return TensorType(shape, "f32")


def random(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


# -- gather --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "columns", "tiled"),
    [("f32", 101, False), ("bf16", 64, False), ("f16", 101, False), ("bf16", 64, True), ("f32", 101, True)],
)
def test_a_table_gives_its_rows(dtype: DType, columns: int, tiled: bool) -> None:
    result = TensorType((6, columns), "bf16", tiled=True) if tiled else real(6, columns)
    call = Call("Gather", (TensorType((9, columns), dtype, True), TensorType((6,), "i32")), (result,), (("axis", 0),))
    table, index = random(9, columns).astype(numpy_dtype(dtype)), np.array([8, -1, 3, 3, 77, 1], np.int32)
    (rows,) = run(gather, call, table, index)
    wanted = table[[8, 0, 3, 3, 8, 1]].astype(np.float32)
    np.testing.assert_array_equal(rows, wanted.astype(numpy_dtype("bf16")).astype(np.float32) if tiled else wanted)


def test_an_index_may_be_of_64_bits() -> None:
    """A scale for each of a token's experts."""
    call = Call("Gather", (TensorType((9,), "bf16", True), TensorType((3, 2), "i64")), (real(3, 2),), (("axis", 0),))
    table, index = random(9).astype(numpy_dtype("bf16")), np.array([[8, 0], [1 << 40, -1], [3, 3]])
    (found,) = run(gather, call, table, index)
    np.testing.assert_array_equal(found, table.astype(np.float32)[[[8, 0], [8, 0], [3, 3]]])


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_several_tables_give_their_rows_in_one_launch(rows: int) -> None:
    """As a step begins: an embedding, of which a row fills two blocks, and two tables of angles."""
    kinds: list[tuple[int, int, DType]] = [(19, 2056, "bf16"), (50, 36, "f32"), (50, 36, "f32"), (7, 129, "f16")]
    tables = [random(entries, columns).astype(numpy_dtype(dtype)) for entries, columns, dtype in kinds]
    numbers = [np.arange(rows, dtype=np.int32) * 5 % (entries + 2) - 1 for entries, *_ in kinds]
    inputs = [
        kind
        for entries, columns, dtype in kinds
        for kind in (TensorType((entries, columns), dtype, True), TensorType((rows,), "i32"))
    ]
    call = Call("llmc.Gather4", tuple(inputs), tuple(real(rows, columns) for _, columns, _ in kinds))
    implementation = gather.implement_several(call, gather.match_several(call, HOPPER) or (), HOPPER)
    assert len(implementation.launches) == 1
    found = run(gather, call, *(array for pair in zip(tables, numbers, strict=True) for array in pair))
    for table, index, got in zip(tables, numbers, found, strict=True):
        np.testing.assert_array_equal(got, table[np.clip(index, 0, len(table) - 1)].astype(np.float32))


def test_a_table_that_none_can_read_leaves_all_to_the_fallback() -> None:
    inputs = (real(4, 3), TensorType((2,), "i32"), TensorType((4, 64), "bf16", tiled=True), TensorType((2,), "i32"))
    assert gather.match_several(Call("llmc.Gather2", inputs, (real(2, 3), real(2, 64))), HOPPER) is None


def test_a_tiled_table_and_other_axes_are_left_to_others() -> None:
    index = TensorType((2,), "i32")
    tiled = Call("Gather", (TensorType((8, 64), "bf16", tiled=True), index), (real(2, 64),), (("axis", 0),))
    other_axis = Call("Gather", (real(3, 4), index), (real(3, 2),), (("axis", 1),))
    assert gather.match(tiled, HOPPER) is None
    assert gather.match(other_axis, HOPPER) is None


# -- elementwise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [name for name, n in elementwise.OPERATORS.items() if n == 1])
def test_one_operand(operation: str, define: Define) -> None:
    call = Call(operation, (real(3, 101),), (real(3, 101),))
    x = np.abs(random(3, 101)) + 0.1 if operation in ("Sqrt", "Reciprocal") else 3 * random(3, 101)
    np.testing.assert_allclose(run(elementwise, call, x)[0], define(call, x)[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("operation", "a", "b"),
    [
        ("Add", (3, 101), (3, 101)),
        ("Sub", (3, 101), (101,)),
        ("Mul", (3, 101), ()),
        ("Div", (3, 1, 5), (4, 1)),
        ("Add", (1, 7), (6, 1)),
    ],
)
def test_two_operands_broadcast(operation: str, a: tuple[int, ...], b: tuple[int, ...], define: Define) -> None:
    call = Call(operation, (real(*a), real(*b)), (real(*np.broadcast_shapes(a, b)),))
    x, y = random(*a), np.abs(random(*b)) + 0.5
    np.testing.assert_allclose(run(elementwise, call, x, y)[0], define(call, x, y)[0], rtol=1e-6)


def test_gelu_has_two_forms(define: Define) -> None:
    call = Call("Gelu", (real(2, 40),), (real(2, 40),), (("approximate", "tanh"),))
    x = random(2, 40)
    np.testing.assert_allclose(run(elementwise, call, x)[0], define(call, x)[0], atol=2e-6)


@pytest.mark.parametrize("operation", ["Div", "Mod"])
def test_a_token_says_its_type_too(operation: str, define: Define) -> None:
    divisor = np.array(160)
    kinds = (TensorType((300,), "i32"), TensorType((), "i64", constant=True))
    call = Call(operation, kinds, (TensorType((300,), "i64"),), (("input.1", 160),))
    x = np.arange(300, dtype=np.int32) * 7 % 320
    wanted = define(call, x.astype(np.int64), divisor)[0]
    np.testing.assert_array_equal(run(elementwise, call, x, None)[0], wanted)


# -- fallback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        Call("Softplus", (real(4, 100),), (real(4, 100),)),
        Call("Softmax", (real(4, 100),), (real(4, 100),), (("axis", -1),)),
        Call("Concat", (real(4, 100), real(4, 20)), (real(4, 120),), (("axis", -1),)),
        Call("Transpose", (real(4, 10, 3),), (real(3, 4, 10),), (("perm", (2, 0, 1)),)),
        Call("MatMul", (real(2, 4, 30), real(30, 50)), (real(2, 4, 50),)),
        Call("Erf", (real(4, 300),), (real(4, 300),)),
    ],
    ids=lambda call: call.op,
)
def test_any_operator_runs(call: Call, define: Define) -> None:
    inputs = [random(*value.shape) for value in call.inputs if value is not None]
    np.testing.assert_allclose(run(fallback, call, *inputs)[0], define(call, *inputs)[0], rtol=2e-5, atol=2e-6)


def test_every_nest_has_a_launch_of_its_own() -> None:
    call = Call("Softmax", (real(4, 100),), (real(4, 100),), (("axis", -1),))
    launches = fallback.implement(call, OneNode(), HOPPER).launches
    assert [launch.grid for launch in launches] == [1, 2, 1, 2]  # of 256 threads over rows, elements, rows, elements


def test_tiles_are_refused() -> None:
    call = Call("Softplus", (TensorType((8, 64), "bf16", tiled=True),), (real(8, 64),))
    with pytest.raises(LlmcError, match="Softplus on tiles"):
        fallback.implement(call, OneNode(), HOPPER)


def test_a_choice_of_whole_numbers_is_refused() -> None:
    """As of Gemma 3n's tokens, those that its table for each layer has no row for."""
    inputs = (TensorType((2,), "bool"), TensorType((2,), "i32"), TensorType((), "i64", constant=True))
    call = Call("Where", inputs, (TensorType((2,), "i64"),), (("input.2", 0),))
    with pytest.raises(LlmcError, match="no schedule for a GPU takes Where"):
        fallback.implement(call, OneNode(), HOPPER)

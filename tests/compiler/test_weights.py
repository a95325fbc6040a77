"""Weights are read late, keep their stored dtype, and are float32 to the graph."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler.frontend.random_weights import random_weight
from llmc.compiler.weights import Coded, Weight, choose_dtype
from llmc.runtime.errors import LlmcError

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def unreadable(name: str = "w", dims: tuple[int, ...] = (2, 3)) -> Weight:
    def read() -> np.ndarray:
        raise AssertionError("read too early")

    return Weight(name, dims, read, "bf16")


def test_a_weight_is_a_float_tensor_to_the_graph() -> None:
    weight = Weight.of_array("w", ROWS.astype(ml_dtypes.bfloat16))
    assert (weight.name, weight.dims, weight.stored_dtype, weight.stored_bytes) == ("w", (2, 3), "bf16", 12)
    assert weight.dtype == ir.DataType.FLOAT
    assert list(weight.shape) == [2, 3]
    np.testing.assert_array_equal(ir.from_proto(ir.to_proto(weight)).numpy(), ROWS)


def test_deriving_a_weight_reads_nothing() -> None:
    joined = Weight.concat([unreadable("q"), unreadable("k")], name="qk")
    assert joined.dims == (4, 3)
    assert joined.slice(1, 3).dims == (2, 3)
    assert joined.stored_dtype == "bf16"
    assert joined.stored_as("f32").stored_dtype == "f32"
    with pytest.raises(AssertionError, match="too early"):
        joined.numpy()


def test_parts_are_joined_and_cut_when_read() -> None:
    weight = Weight.of_array("w", ROWS)
    np.testing.assert_array_equal(Weight.concat([weight, weight], axis=1).numpy(), np.hstack([ROWS, ROWS]))
    np.testing.assert_array_equal(weight.slice(1, 3, axis=1).numpy(), ROWS[:, 1:3])


def test_parts_stored_differently_are_joined_in_float32() -> None:
    exact, rounded = Weight.of_array("a", ROWS), Weight.of_array("b", ROWS.astype(ml_dtypes.bfloat16))
    assert Weight.concat([exact, rounded]).stored_dtype == "f32"


def test_how_a_checkpoint_keeps_values_is_said_of_what_is_made_of_them() -> None:
    def weight(coded: Coded | None) -> Weight:
        return Weight("w", (2, 3), lambda: ROWS, "bf16", coded)

    awq, q6_k = Coded(4, 128, zeros=True), Coded(6, 16)
    assert weight(awq).stored_as("f32").slice(0, 1).coded == awq
    assert Weight.concat([weight(awq), weight(None), weight(Coded(4, 32))]).coded == Coded(4, 32, zeros=True)
    assert Weight.concat([weight(awq), weight(q6_k)]).coded == Coded(6, 16, zeros=True)
    assert Weight.concat([weight(None), weight(None)]).coded is None
    sizes = (32, 128, 96)
    assert [awq.has_zeros_of(size) for size in sizes] == [True, True, False]
    without = Coded(5, 32, zeros=True), Coded(4, 0, zeros=True), Coded(4, 32)
    assert not any(coded.has_zeros_of(32) for coded in without)


def test_a_computed_weight_is_cast_to_its_stored_dtype() -> None:
    weight = Weight.computed("third", (1,), lambda: np.full(1, 1 / 3), "bf16")
    assert weight.stored().dtype == ml_dtypes.bfloat16
    assert weight.numpy().dtype == np.float32
    assert weight.numpy()[0] == np.float32(ml_dtypes.bfloat16(1 / 3))


def test_a_read_of_the_wrong_shape_is_caught() -> None:
    with pytest.raises(ValueError, match=r"w: read gave shape \(2, 3\), not \(3, 2\)"):
        Weight("w", (3, 2), lambda: ROWS).numpy()


def test_random_weights_depend_on_seed_name_and_shape_alone() -> None:
    weight = random_weight("a.weight", (300, 40), "f32", std=0.02, seed=1)
    np.testing.assert_array_equal(weight.numpy(), weight.numpy())
    for name, dims, seed in (("b.weight", (300, 40), 1), ("a.weight", (40, 300), 1), ("a.weight", (300, 40), 2)):
        other = random_weight(name, dims, "f32", std=0.02, seed=seed)
        assert not np.array_equal(weight.numpy().ravel(), other.numpy().ravel())


def test_random_weights_are_normal_and_no_two_rows_are_equal() -> None:
    values = random_weight("a.weight", (5000, 64), "f32", std=0.02, seed=0).numpy()
    assert abs(values.mean()) < 2e-4
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert len(np.unique(values, axis=0)) == 5000


def test_random_values_are_the_same_in_every_dtype_up_to_rounding() -> None:
    exact = random_weight("a.weight", (64, 64), "f32", std=0.02, seed=0)
    rounded = random_weight("a.weight", (64, 64), "bf16", std=0.02, seed=0)
    np.testing.assert_array_equal(exact.stored_as("bf16").numpy(), rounded.numpy())


def test_random_norms_are_about_one_and_biases_about_zero() -> None:
    assert random_weight("norm.weight", (512,), "f32", std=0.02, seed=0).numpy().mean() == pytest.approx(1, abs=0.01)
    assert random_weight("norm.bias", (512,), "f32", std=0.02, seed=0).numpy().mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("dims", [(), (1,), (200_000,), (3, 1), (2, 3, 4)])
def test_random_weights_have_any_shape(dims: tuple[int, ...]) -> None:
    assert random_weight("w", dims, "bf16", std=1, seed=0).stored().shape == dims


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for() -> None:
    assert choose_dtype("f32", None) == ("f32", None)
    assert choose_dtype("bf16", None) == ("bf16", None)
    assert choose_dtype("f32", "bf16") == ("bf16", None)
    assert choose_dtype("f16", "f32") == ("f32", None)


def test_float16_stays_where_there_are_kernels_for_it() -> None:
    assert choose_dtype("f16", None, has_f16=True) == ("f16", None)
    assert choose_dtype("bf16", "f16", has_f16=True) == ("f16", None)


def test_storing_float16_as_bfloat16_is_said_aloud() -> None:
    dtype, note = choose_dtype("f16", None)
    assert dtype == "bf16"
    assert note is not None
    assert "float16 weights are stored as bfloat16" in note


@pytest.mark.parametrize("asked", ["f16", "int8"])
def test_dtypes_without_kernels_are_refused(asked: str) -> None:
    with pytest.raises(LlmcError) as error:
        choose_dtype("f32", asked)
    assert "bf16" in str(error.value.hint)


def test_onnx_external_data_is_read_late(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(ROWS.tobytes())
    tensor = ir.ExternalTensor("data", 0, 24, ir.DataType.FLOAT, shape=ir.Shape((2, 3)), name="w", base_dir=tmp_path)
    weight = Weight("w", (2, 3), tensor.numpy)
    np.testing.assert_array_equal(weight.numpy(), ROWS)

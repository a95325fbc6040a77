"""Linear layers against their definitions, and the promise of the same bits at every M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import ops
from llmc.compiler.graph.run import evaluate
from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear import rule as linear
from llmc.schedules.cpu.linear.panel_layout import Panels, PanelVector
from llmc.schedules.execute import Executable

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

SHAPES = [(1, 16, 64), (2, 40, 80), (3, 100, 101), (5, 1000, 64), (8, 16, 100), (16, 100, 80), (17, 40, 99)]
LARGE = [(37, 100, 64), (64, 1000, 80), (128, 40, 64), (1, 48, 11008), (5, 64, 11008)]
BF16 = Target("cpu", "x86-64-v4+bf16")
FAMILY = [name for name in ops.OPERATORS if name.startswith(("Linear", "GatedLinear"))]
ON_GPUS = ("Moments", "Append", "Strips", "StripsBias")
NAMES = [name for name in FAMILY if not name.endswith(ON_GPUS)]  # those are for GPUs alone: see passes


def linear_call(name: str, m: int, n: int, k: int, dtype: DType = "f32") -> Call:
    """One call of an operator of the family: x [m, k] to y [m, n]."""
    rows = 2 * n if name.startswith("Gated") else n
    inputs = [TensorType((m, k), "f32"), TensorType((rows, k), dtype, constant=True)]
    if "Bias" in name:
        inputs.append(TensorType((rows,), dtype, constant=True))
    if "Residual" in name:
        inputs.append(TensorType((m, n), "f32"))
    return Call(f"llmc.{name}", tuple(inputs), (TensorType((m, n), "f32"),))


def random_inputs(call: Call, seed: int = 0) -> list[Array]:
    """Inputs whose products are of about the size of 1."""
    generator = np.random.default_rng(seed)
    inputs = []
    for kind in call.inputs:
        assert kind is not None
        scale = kind.shape[-1] ** -0.5 if len(kind.shape) == 2 and kind.constant else 1.0
        inputs.append((generator.standard_normal(kind.shape) * scale).astype(numpy_dtype(kind.dtype)))
    return inputs


def defined(call: Call, inputs: list[Array]) -> Array:
    """What the operator's definition gives in ONNX Runtime, in float32."""
    name = call.op.removeprefix("llmc.")
    float32 = ir.TensorType(ir.DataType.FLOAT)
    arguments = [ir.Value(name=f"i{i}", type=float32, shape=ir.Shape(a.shape)) for i, a in enumerate(inputs)]
    y = ir.Value(name="y", type=float32)
    node = ir.Node(ops.DOMAIN, name, arguments, outputs=[y])
    graph = ir.Graph(arguments, [y], nodes=[node], opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION})
    feeds = {f"i{i}": np.asarray(array, np.float32) for i, array in enumerate(inputs)}
    return evaluate(ir.Model(graph, ir_version=10), feeds)["y"]


def product(x: Array, weight: Array) -> Array:
    """x Wᵀ in float64, with x rounded as the weight's type asks."""
    rounded = x.astype(weight.dtype) if weight.dtype == ml_dtypes.bfloat16 else x
    result: Array = rounded.astype(np.float64) @ weight.astype(np.float64).T
    return result


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_small_shape_is_right_on_every_level(
    run: Run, target: Target, shape: tuple[int, int, int], dtype: DType
) -> None:
    call = linear_call("Linear", *shape, dtype)
    x, weight = random_inputs(call)
    (y,) = run(call, x, weight, target=target, n_tasks=3)
    np.testing.assert_allclose(y, product(x, weight), atol=3e-6)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_every_large_shape_is_right(run: Run, host: Target, shape: tuple[int, int, int], dtype: DType) -> None:
    call = linear_call("Linear", *shape, dtype)
    x, weight = random_inputs(call)
    (y,) = run(call, x, weight, target=host, n_tasks=2)
    np.testing.assert_allclose(y, product(x, weight), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_what_its_definition_says(run: Run, host: Target, name: str) -> None:
    call = linear_call(name, 3, 40, 64)
    inputs = random_inputs(call)
    (y,) = run(call, *inputs, target=host)
    np.testing.assert_allclose(y, defined(call, inputs), atol=4e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["LinearBiasGeluResidual", "GatedLinearSiluBias"])
@pytest.mark.parametrize("m", [1, 6, 30])
def test_epilogues_are_right_on_every_level_in_bf16(run: Run, target: Target, name: str, m: int) -> None:
    call = linear_call(name, m, 40, 64, "bf16")
    x, *rest = random_inputs(call)
    (y,) = run(call, x, *rest, target=target, n_tasks=2)
    expected = defined(call, [x.astype(ml_dtypes.bfloat16), *rest])
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["Linear", "LinearRelu", "LinearSilu", "LinearGelu", "LinearGeluTanh"])
def test_activations_are_right_far_from_zero(run: Run, host: Target, name: str) -> None:
    call = linear_call(name, 1, 64, 1)
    weight = np.concatenate([np.linspace(-200, 200, 61), [-1e30, 1e30, 0.0]]).astype(np.float32)[:, None]
    (y,) = run(call, np.ones((1, 1), np.float32), weight, target=host)
    expected = defined(call, [np.ones((1, 1), np.float32), weight])
    np.testing.assert_allclose(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["LinearBiasGeluResidual", "GatedLinearSilu"])
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(
    run: Run, target: Target, dtype: DType, name: str
) -> None:
    n, k = (100, 2500) if name.startswith("Linear") else (40, 600)
    whole = linear_call(name, 512, n, k, dtype)
    x, weight, *rest = random_inputs(whole)
    (expected,) = run(whole, x, weight, *rest, target=target)
    for m, first in [(1, 0), (1, 511), (2, 7), (5, 100), (16, 40), (37, 3), (128, 300)]:
        part = [array[first : first + m] if array.shape == (512, n) else array for array in rest]
        call = linear_call(name, m, n, k, dtype)
        (y,) = run(call, x[first : first + m], weight, *part, target=target, n_tasks=2)
        np.testing.assert_array_equal(y.view(np.uint32), expected[first : first + m].view(np.uint32))


def test_the_number_of_tasks_changes_no_bit(run: Run, host: Target) -> None:
    call = linear_call("LinearSilu", 20, 1000, 300, "bf16")
    x, weight = random_inputs(call)
    results = [run(call, x, weight, target=host, n_tasks=n_tasks)[0].tobytes() for n_tasks in (1, 2, 3, 7, 64)]
    assert len(set(results)) == 1


def test_tiles_change_no_bit(host: Target) -> None:
    call = linear_call("LinearBias", 20, 256, 1100, "bf16")
    inputs = random_inputs(call)
    candidates = list(linear.space(call, host))
    assert len(candidates) > 10
    results = {
        Executable(call, linear.implement(call, tiles, host), host).run(*inputs)[0].tobytes()
        for tiles in candidates[:: len(candidates) // 5]
    }
    assert len(results) == 1


def test_activations_are_rounded_to_the_nearest_even_bf16(run: Run, target: Target) -> None:
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    x[:, ::3] = (x[:, ::3].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)  # half way between two
    x[0, :4] = [0.0, -0.0, 3.0e38, -1.5]
    call = linear_call("Linear", 2, 64, 64, "bf16")
    (y,) = run(call, x, np.eye(64, dtype=ml_dtypes.bfloat16), target=target)
    np.testing.assert_array_equal(y, x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_row_that_is_not_a_number_leaves_the_others_alone(run: Run, target: Target, dtype: DType) -> None:
    call = linear_call("Linear", 5, 40, 33, dtype)
    x, weight = random_inputs(call)
    x[2, 32] = np.nan
    (y,) = run(call, x, weight, target=target)
    assert np.isnan(y[2]).all()
    np.testing.assert_allclose(np.delete(y, 2, 0), product(np.delete(x, 2, 0), weight), atol=1e-6)


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("layout", [Panels("f32"), Panels("bf16"), Panels("bf16", 2), Panels("f32", 2)], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (100, 33), (2, 1)])
def test_a_packed_weight_can_be_unpacked(layout: Panels, stored: str, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(stored))
    packed = layout.pack(weight)
    assert packed.nbytes == layout.n_bytes(shape)
    assert packed.flags.c_contiguous
    expected = weight.astype(numpy_dtype(layout.dtype))
    np.testing.assert_array_equal(layout.unpack(packed, shape), expected)


def test_gate_and_up_panels_alternate() -> None:
    weight = np.repeat(np.arange(4, dtype=np.float32), 16)[:, None]  # gate panels 0, 1; up panels 2, 3
    panels = Panels("f32", 2).pack(weight).view(np.float32).reshape(4, 16)
    assert panels[:, 0].tolist() == [0, 2, 1, 3]
    bias = PanelVector(2).pack(weight.reshape(-1)).view(np.float32).reshape(4, 16)
    np.testing.assert_array_equal(bias, panels)


def test_a_weight_that_is_computed_is_not_ours(host: Target) -> None:
    call = linear_call("Linear", 1, 16, 16)
    computed = Call(call.op, (call.inputs[0], TensorType((16, 16), "f32")), call.outputs)
    assert linear.match(call, host) is not None
    assert linear.match(computed, host) is None


def test_packing_is_one_kernel_for_all_layers_of_the_same_input() -> None:
    target = Target("cpu", "x86-64-v4+bf16")
    names = set()
    for name, n in [("Linear", 64), ("LinearRelu", 128), ("GatedLinearSilu", 256)]:
        call = linear_call(name, 4, n, 64, "bf16")
        tiles = linear.match(call, target)
        assert tiles is not None
        names.add(linear.implement(call, tiles, target).launches[0].kernel.name)
    assert len(names) == 1


def test_a_launch_says_what_it_reads_and_computes() -> None:
    target = Target("cpu", "x86-64-v4+bf16")
    call = linear_call("Linear", 1, 4096, 4096, "bf16")
    tiles = linear.match(call, target)
    assert tiles is not None
    launch = linear.implement(call, tiles, target).launches[-1]
    assert launch.n_bytes == 2 * 4096 * 4096 + 4 * (4096 + 4096)
    assert launch.n_operations == 2 * 4096 * 4096


@pytest.mark.parametrize(("m", "dtype", "in_turn"), [(7, "bf16", False), (8, "bf16", True), (8, "f32", False)], ids=str)
def test_lines_are_asked_for_in_turn_where_there_is_time(m: int, dtype: DType, in_turn: bool) -> None:
    layer = linear.parse(linear_call("Linear", m, 64, 256, dtype), BF16)
    assert layer
    assert linear.asks_in_turn(layer, linear.default_tiles(layer, BF16)) == in_turn


def test_sixteen_rows_are_one_tile_and_prompts_are_as_they_were() -> None:
    tiles = []
    for name, m in [("Linear", 16), ("GatedLinearSilu", 16), ("Linear", 64)]:
        layer = linear.parse(linear_call(name, m, 64, 256, "bf16"), BF16)
        assert layer
        tiles.append(linear.default_tiles(layer, BF16))
    assert [(t.rows, t.panels, t.near, t.far) for t in tiles] == [(16, 1, 128, 0), (8, 2, 64, 0), (13, 2, 8, 128)]

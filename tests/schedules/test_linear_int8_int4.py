"""Linear layers with int8 and int4 weights: exact within a block, and the same bits at every M and on every CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import ops
from llmc.compiler.graph.run import evaluate
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.quantization.inputs import block_of
from llmc.compiler.quantization.quantize import Quantized, Scheme, quantize
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear import quant_rule as quant_linear
from llmc.schedules.cpu.linear.quant_layout import Int4Panels, Int4ZerosPanels, Int8Panels
from llmc.schedules.execute import Executable
from llmc.schedules.lower import compile_kernel
from tests.schedules.test_linear import NAMES

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 128), Scheme(4, 32, zeros=True)]
SHAPES = [(1, 33, 100), (5, 100, 300), (17, 40, 128)]


def quant_call(name: str, m: int, n: int, k: int, scheme: Scheme) -> Call:
    """One call of an operator of the family: x [m, k] to y [m, n]."""
    rows = 2 * n if name.startswith("Gated") else n
    weight = TensorType((rows, k), scheme.dtype, True, scheme.group)
    inputs = [TensorType((m, k), "f32"), weight]
    if "Bias" in name:
        inputs.append(TensorType((rows,), "f32", constant=True))
    if "Residual" in name:
        inputs.append(TensorType((m, n), "f32"))
    return Call(f"llmc.{name}", tuple(inputs), (TensorType((m, n), "f32"),))


def random_inputs(call: Call, seed: int = 0) -> tuple[Array, Quantized, list[Array]]:
    """x, the weight, and the rest; the products are of about the size of 1."""
    generator = np.random.default_rng(seed)
    arrays = [generator.standard_normal(kind.shape).astype(np.float32) for kind in call.inputs if kind is not None]
    kind = call.inputs[1]
    assert kind is not None
    scheme = Scheme(8 if kind.dtype == "i8" else 4, kind.group, zeros=kind.dtype == "z4")
    return arrays[0], quantize(arrays[1] * kind.shape[1] ** -0.5, scheme), arrays[2:]


def as_read(x: Array, scheme: Scheme) -> Array:
    """x as the kernels see it: int8 with a scale for each row and block, in float64."""
    m, k = x.shape
    block = scheme.group or block_of(k)
    blocks = np.pad(x, ((0, 0), (0, -k % block))).reshape(m, -1, block)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(largest > 0, np.rint(blocks * (np.float32(127) / largest)), 0)
    values: Array = codes * (largest / np.float32(127)).astype(np.float64)
    return values.reshape(m, -1)[:, :k]


def product(x: Array, weight: Quantized) -> Array:
    """x Wᵀ in float64, of the values that are multiplied."""
    result: Array = as_read(x, weight.scheme) @ weight.values().astype(np.float64).T
    return result


def defined(call: Call, inputs: list[Array]) -> Array:
    """What the operator's definition gives in ONNX Runtime, in float32."""
    float32 = ir.TensorType(ir.DataType.FLOAT)
    arguments = [ir.Value(name=f"i{i}", type=float32, shape=ir.Shape(a.shape)) for i, a in enumerate(inputs)]
    y = ir.Value(name="y", type=float32)
    node = ir.Node(ops.DOMAIN, call.op.removeprefix("llmc."), arguments, outputs=[y])
    graph = ir.Graph(arguments, [y], nodes=[node], opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION})
    feeds = {f"i{i}": np.asarray(array, np.float32) for i, array in enumerate(inputs)}
    return evaluate(ir.Model(graph, ir_version=10), feeds)["y"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_right_on_every_level(
    run: Run, target: Target, shape: tuple[int, int, int], scheme: Scheme
) -> None:
    call = quant_call("Linear", *shape, scheme)
    x, weight, _ = random_inputs(call)
    (y,) = run(call, x, weight, target=target, n_tasks=3)
    np.testing.assert_allclose(y, product(x, weight), atol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_level_gives_the_same_bits(run: Run, target: Target, host: Target, scheme: Scheme) -> None:
    call = quant_call("Linear", 5, 100, 300, scheme)
    x, weight, _ = random_inputs(call)
    (y,), (expected,) = (run(call, x, weight, target=level) for level in (target, host))
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_what_its_definition_says(run: Run, host: Target, name: str) -> None:
    scheme = SCHEMES[len(name) % 4]
    call = quant_call(name, 3, 40, 64, scheme)
    x, weight, rest = random_inputs(call)
    (y,) = run(call, x, weight, *rest, target=host, n_tasks=2)
    expected = defined(call, [as_read(x, scheme), weight.values(), *rest])
    np.testing.assert_allclose(y, expected, atol=4e-6, rtol=2e-6)


@pytest.mark.parametrize("scheme", [*SCHEMES[:2], SCHEMES[3]], ids=str)
@pytest.mark.parametrize("name", ["LinearBiasGeluResidual", "GatedLinearSilu"])
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(
    run: Run, host: Target, scheme: Scheme, name: str
) -> None:
    n, k = 40, 320
    whole = quant_call(name, 128, n, k, scheme)
    x, weight, rest = random_inputs(whole)
    (expected,) = run(whole, x, weight, *rest, target=host)
    for m, first in [(1, 0), (1, 127), (2, 7), (5, 100), (16, 40), (17, 60), (40, 3)]:
        part = [array[first : first + m] if array.shape == (128, n) else array for array in rest]
        call = quant_call(name, m, n, k, scheme)
        (y,) = run(call, x[first : first + m], weight, *part, target=host, n_tasks=2)
        np.testing.assert_array_equal(y.view(np.uint32), expected[first : first + m].view(np.uint32))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sums_of_products_are_exact(run: Run, target: Target, scheme: Scheme) -> None:
    """Whole numbers with a scale of 1, at the ends of their range: the largest sums there are."""
    call = quant_call("Linear", 5, 100, 300, scheme)
    generator = np.random.default_rng(0)
    low, high = (-127, 127) if scheme.bits == 8 else (-8, 7)
    codes = generator.choice([low, low, high, 1], (100, 300)).astype(np.int8)
    codes[:10], codes[10:20] = low, high
    groups = 1 if scheme.bits == 8 else -(-300 // scheme.group)
    scales = np.ones((100, groups), np.float32 if scheme.bits == 8 else np.float16)
    zeros = generator.integers(-8, 9, scales.shape).astype(np.float16) if scheme.zeros else None
    weight = Quantized(codes, scales, scheme, zeros=zeros)
    x = generator.choice([-127, 127, 3], (5, 300)).astype(np.float32)
    x[:2] = np.array([[127], [-127]])
    x[:, ::16] = 127  # every block has the scale 1
    (y,) = run(call, x, weight, target=target)
    np.testing.assert_array_equal(y, x @ weight.values().T)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_comes_back_from_its_layout(run: Run, host: Target, scheme: Scheme) -> None:
    call = quant_call("Linear", 128, 40, 128, scheme)
    _, weight, _ = random_inputs(call)
    (y,) = run(call, np.eye(128, dtype=np.float32), weight, target=host)
    np.testing.assert_allclose(y.T, weight.values(), rtol=3e-7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_row_that_is_not_a_number_leaves_the_others_alone(run: Run, target: Target, scheme: Scheme) -> None:
    call = quant_call("Linear", 5, 100, 300, scheme)
    x, weight, _ = random_inputs(call)
    x[2, 299], x[3, 0], x[4] = np.nan, np.inf, 0
    (y,) = run(call, x, weight, target=target)
    assert np.isnan(y[2]).all()
    assert not np.isfinite(y[3]).any()
    assert not y[4].any()
    np.testing.assert_allclose(y[:2], product(x[:2], weight), atol=2e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e30])
def test_small_and_large_activations_keep_their_digits_or_vanish(run: Run, target: Target, scale: float) -> None:
    call = quant_call("Linear", 5, 100, 300, Scheme(8))
    x, weight, _ = random_inputs(call)
    x = (x * np.float32(scale)).astype(np.float32)
    (y,) = run(call, x, weight, target=target)
    expected = product(x, weight) if scale > 1e-30 else 0
    np.testing.assert_allclose(y / np.float32(scale), np.asarray(expected) / scale, atol=3e-6)


def test_one_large_column_costs_the_others_little(run: Run, host: Target) -> None:
    """Why x has a scale for each block: with one a row, this error would be near 1."""
    call = quant_call("Linear", 5, 100, 1024, Scheme(8))
    x, weight, _ = random_inputs(call)
    weight = Quantized(np.where(np.arange(1024) == 70, 0, weight.codes).astype(np.int8), weight.scales, weight.scheme)
    x[:, 70] = 1000
    (y,) = run(call, x, weight, target=host)
    error = y - x.astype(np.float64) @ weight.values().astype(np.float64).T
    assert np.sqrt((error**2).mean()) < 0.4


def test_the_number_of_tasks_changes_no_bit(run: Run, host: Target) -> None:
    call = quant_call("LinearBiasGeluResidual", 17, 40, 320, Scheme(4, 32))
    x, weight, rest = random_inputs(call)
    results = [run(call, x, weight, *rest, target=host, n_tasks=n)[0].tobytes() for n in (1, 2, 3, 64)]
    assert len(set(results)) == 1


def test_sixteen_rows_are_one_tile_where_memory_is_the_limit() -> None:
    target = Target("cpu", "x86-64-v4+bf16")
    cases: list[tuple[str, Scheme, int]] = [
        ("Linear", Scheme(8), 1),
        ("GatedLinearSilu", Scheme(8), 2),
        ("Linear", Scheme(4, 32), 2),
    ]
    for name, scheme, row_tiles in cases:
        quant = quant_linear.parse(quant_call(name, 16, 64, 128, scheme), target, "i8" if scheme.bits == 8 else "i4")
        assert quant
        assert quant_linear.default_tiles(quant, target).row_tiles(quant.linear) == row_tiles


def test_lines_are_asked_for_beside_the_products() -> None:
    """A pair of groups of two panels is 18 lines, and no more than one of each panel is asked for at once: LLVM, left
    alone, asks for all at the end of a loop."""
    target = Target("cpu", "x86-64-v4+bf16")
    quant = quant_linear.parse(quant_call("Linear", 8, 64, 4096, Scheme(4, 32)), target, "i4")
    assert quant
    code = compile_kernel(quant_linear.product_kernel(quant, quant_linear.default_tiles(quant, target)), target)
    asked = [match.start() for match in re.finditer(rb"\x0f\x18", code)]  # prefetcht0
    assert len(asked) == 18
    assert all(later - first > 100 for first, later in zip(asked, asked[2:], strict=False))


@pytest.mark.parametrize("rule", quant_linear.RULES[:2], ids=["int8", "int4"])
def test_tiles_change_no_bit(host: Target, rule: Any) -> None:
    scheme = Scheme(8) if rule is quant_linear.INT8 else Scheme(4, 32)
    call = quant_call("Linear", 20, 128, 128, scheme)
    x, weight, _ = random_inputs(call)
    candidates = list(rule.space(call, host))
    assert len(candidates) > 10
    inputs: list[Any] = [x, weight]
    results = {
        Executable(call, rule.implement(call, tiles, host), host).run(*inputs)[0].tobytes()
        for tiles in candidates[:: len(candidates) // 4]
    }
    assert len(results) == 1


@pytest.mark.parametrize("shape", [(2, 1), (100, 33), (64, 640), (130, 300)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_layout_says_how_many_bytes_it_packs(shape: tuple[int, int], parts: int) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for scheme in SCHEMES:
        four_bits = quant_linear.FOUR_BITS.get(scheme.dtype, Int4Panels)
        layout = Int8Panels(parts) if scheme.bits == 8 else four_bits(scheme.group, parts)
        assert layout.pack(quantize(array, scheme)).nbytes == layout.n_bytes(shape)


def test_a_large_layer_takes_the_bytes_that_its_layout_promises() -> None:
    shape = (11008, 4096)
    n_weights = shape[0] * shape[1]
    assert Int8Panels().n_bytes(shape) == n_weights + 4 * 11008
    assert Int4Panels(32).n_bytes(shape) == n_weights // 2 + n_weights // 32 * 2
    assert Int4ZerosPanels(32).n_bytes(shape) == n_weights // 2 + n_weights // 32 * 4
    assert Int4Panels(128).n_bytes(shape) == n_weights // 2 + n_weights // 128 * 2


def test_other_weights_are_not_ours(host: Target) -> None:
    call = quant_call("Linear", 1, 16, 32, Scheme(8))
    assert quant_linear.INT8.match(call, host) is not None
    assert quant_linear.INT4.match(call, host) is None
    for weight in (TensorType((16, 32), "f32", constant=True), TensorType((16, 32), "i8")):
        other = Call(call.op, (call.inputs[0], weight), call.outputs)
        assert quant_linear.INT8.match(other, host) is None


def test_quantising_x_is_one_kernel_for_all_layers_of_the_same_input(host: Target) -> None:
    names = set()
    for name, n in [("Linear", 64), ("LinearRelu", 128), ("GatedLinearSilu", 256)]:
        call = quant_call(name, 4, n, 64, Scheme(4, 32))
        quant = quant_linear.parse(call, host, "i4")
        assert quant is not None
        names.add(quant_linear.implement(quant, quant_linear.default_tiles(quant, host), call).launches[0].kernel.name)
    assert len(names) == 1

"""passes/scale_columns.py and compiler/quantization/columns.py"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.graph.shapes import dims
from llmc.compiler.quantization.calibrate import Calibration
from llmc.compiler.quantization.columns import Columns, gains, scales_for
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.compiler.weights import Coded, Weight
from llmc.passes.scale_columns import scale_columns

SEQUENCES = tuple(np.random.default_rng(3).integers(0, 11, (2, 40)))


INT8 = Scheme(8)


def scaling(scheme: Scheme = INT8) -> Callable[[ir.Model], int]:
    found = partial(scale_columns, scheme=scheme, columns=Columns(Calibration("", "", SEQUENCES)))
    found.__name__ = "scale_columns"  # type: ignore[attr-defined]
    return found


def uneven(build: Any, name: str, *shape: int, loud: int = 3) -> ir.Value:
    """A weight, one of whose last columns, or of whose rows, is a hundred times as large as the others."""
    value = build.weight(name, *shape)
    array = value.const_value.numpy().copy()
    array[..., loud] *= 100
    value.const_value = Weight.of_array(name, array)
    return value  # type: ignore[no-any-return]


def embedded(build: Any) -> ir.Value:
    tokens, _ = build.token_inputs()
    return build.op("Gather", build.weight("embed", 11, 8), tokens, axis=0)  # type: ignore[no-any-return]


def normed(build: Any) -> ir.Value:
    return build.op("RMSNormalization", embedded(build), uneven(build, "g", 8), axis=-1, epsilon=1e-6)  # type: ignore[no-any-return]


def ended(build: Any, y: ir.Value) -> ir.Model:
    """The graph, with a norm at its end: so no product makes logits."""
    x = build.op("RMSNormalization", y, build.weight("end", dims(y)[-1]), axis=-1, epsilon=1e-6)
    return build.model(x)  # type: ignore[no-any-return]


def test_a_norm_divides_what_products_multiply(build: Any, check: Any) -> None:
    x = normed(build)
    both = build.op("Concat", build.op("llmc.Linear", x, build.weight("W", 6, 8)), x_gated(build, x), axis=-1)
    check(ended(build, both), scaling(), 1)


def x_gated(build: Any, x: ir.Value) -> ir.Value:
    return build.op("llmc.GatedLinearSilu", x, build.weight("V", 8, 8))  # type: ignore[no-any-return]


def test_norms_of_sums_and_with_biases_divide_too(build: Any, check: Any) -> None:
    h = embedded(build)
    total, x = build.op("llmc.AddRMSNorm", h, h, uneven(build, "g", 8), n_results=2, epsilon=1e-6)
    y = build.op("llmc.LinearResidual", x, build.weight("W", 8, 8), total)
    weights = uneven(build, "g.2", 8), uneven(build, "b.2", 8)
    _, z = build.op("llmc.AddLayerNorm", y, total, *weights, n_results=2, epsilon=1e-6)
    check(ended(build, build.op("llmc.Linear", z, build.weight("W.2", 6, 8))), scaling(), 2)


def test_a_gated_product_divides_by_its_second_half_and_relu_by_all_rows(build: Any, check: Any) -> None:
    gate = build.weight("V", 16, 8)
    array = gate.const_value.numpy().copy()
    array[9] *= 100
    gate.const_value = Weight.of_array("V", array)
    down = build.op("llmc.Linear", build.op("llmc.GatedLinearSilu", embedded(build), gate), build.weight("W", 8, 8))
    bias = uneven(build, "b", 8)
    up = build.op("llmc.LinearBiasRelu", down, build.weight("U", 8, 8), bias)
    check(ended(build, build.op("llmc.Linear", up, build.weight("D", 6, 8))), scaling(), 2)


def test_an_x_with_another_user_is_left(build: Any, refused: Any) -> None:
    x = normed(build)
    refused(ended(build, build.op("Add", build.op("llmc.Linear", x, build.weight("W", 8, 8)), x)), scaling())


def test_an_x_that_is_added_to_its_product_is_left(build: Any, refused: Any) -> None:
    x = normed(build)
    refused(ended(build, build.op("llmc.LinearResidual", x, build.weight("W", 8, 8), x)), scaling())


def test_what_makes_the_logits_is_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("llmc.Linear", normed(build), build.weight("W", 12, 8))), scaling())


def test_a_weight_with_another_user_is_left(build: Any, refused: Any) -> None:
    table = build.weight("embed", 11, 8)
    tokens, _ = build.token_inputs()
    h = build.op("Gather", table, tokens, axis=0)
    x = build.op("RMSNormalization", h, uneven(build, "g", 8), axis=-1, epsilon=1e-6)
    refused(ended(build, build.op("llmc.Linear", x, table)), scaling())


@pytest.mark.parametrize(
    ("coded", "scheme", "n"),
    [(Coded(4, 32), Scheme(4, 32), 0), (Coded(4, 32), Scheme(8), 1), (Coded(8), Scheme(8), 0)],
    ids=["int4 of groups", "int8 of groups", "int8 of rows"],
)
def test_codes_that_may_be_kept_are_left(build: Any, coded: Coded, scheme: Scheme, n: int) -> None:
    weight = build.weight("W", 8, 8)
    array = weight.const_value.numpy()
    weight.const_value = Weight("W", (8, 8), lambda: array, "f32", coded)
    assert scaling(scheme)(ended(build, build.op("llmc.Linear", normed(build), weight))) == n


def test_graphs_of_one_model_get_the_same_weights(build: Any) -> None:
    model = ended(build, build.op("llmc.Linear", normed(build), build.weight("W", 8, 8)))
    other, scale = graph.clone(model), scaling()
    assert scale(model) == scale(other) == 1
    made = [
        [v.const_value for v in m.graph.initializers.values() if str(v.name).endswith("scaled")] for m in (model, other)
    ]
    assert len(made[0]) == 2
    assert np.ptp(made[0][0].numpy()) > 0  # type: ignore[union-attr]
    assert all(a is b for a, b in zip(*made, strict=True))


def test_scales_are_powers_of_two_that_follow_the_inputs() -> None:
    x = np.random.default_rng(0).normal(0, 1, (64, 6)).astype(np.float32) * np.array([1, 1, 1, 64, 0, 1], np.float32)
    scales = scales_for([x[:32], x[32:]])
    assert scales.tolist() == [1, 1, 1, 4, 2**-3, 1]


def test_scaled_columns_lose_less_where_some_inputs_are_large() -> None:
    """What the pass is for: the error of a product in int8, or int4, of inputs of which some columns are large."""
    random = np.random.default_rng(0)
    x = random.normal(0, 1, (256, 128)) * np.where(np.arange(128) % 32 == 5, 30.0, 1.0)
    w = random.normal(0, 1, (64, 128)).astype(np.float32)
    s = scales_for([x.astype(np.float32)])

    def lost(scales: Any, scheme: Scheme) -> float:
        step = np.abs(x / scales).max(1, keepdims=True) / 127
        found = np.rint(x / scales / step) * step @ quantize(w * scales, scheme).values().T
        return float(np.square(found - x @ w.T).mean())

    for scheme in (Scheme(8), Scheme(4, 32)):
        assert lost(s, scheme) < 0.7 * lost(np.float32(1), scheme)


def test_columns_are_scaled_where_that_loses_less() -> None:
    """Where the weights that meet large numbers are as much smaller, scaling them takes digits from the others."""
    random = np.random.default_rng(0)
    loud = np.where(np.arange(128) % 32 == 5, 64.0, 1.0)
    x = (random.normal(0, 1, (256, 128)) * loud).astype(np.float32)
    w = random.normal(0, 1, (64, 128)).astype(np.float32)
    scales = scales_for([x])

    def gain(weight: Any, scheme: Scheme) -> bool:
        return gains(scales, [x], [Weight("w", weight.shape, lambda: weight, "f32")], scheme)

    assert gain(w, Scheme(8))
    assert gain(w, Scheme(4, 32))
    assert not gain(w * loud.astype(np.float32), Scheme(4, 32))
    assert not gains(np.ones_like(scales), [x], [], Scheme(8))

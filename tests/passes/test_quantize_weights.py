"""passes/quantize_weights.py"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.quantization.calibrate import Calibration, Fitting
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.report import notes_of_logits
from llmc.compiler.weights import Coded, Weight
from llmc.passes.quantize_weights import are_logits_quantized, quantize_weights
from llmc.runtime.errors import LlmcError

INT4 = partial(quantize_weights, scheme=Scheme(4, 32))


def layers(build: Any) -> ir.Model:
    """An embedding whose table also makes the logits, a gated layer, one with a bias, a norm."""
    table = build.weight("embed.weight", 12, 32)
    tokens, _ = build.token_inputs()
    h = build.op("Gather", table, tokens, axis=0)
    gated = build.op("llmc.GatedLinearSilu", h, build.weight("mlp.weight", 128, 32))
    down = build.weight("down.weight", 32, 64)
    h = build.op("llmc.LinearBiasResidual", gated, down, build.weight("down.bias", 32), h)
    h = build.op("RMSNormalization", h, build.weight("norm.weight", 32), axis=-1, epsilon=1e-5)
    model: ir.Model = build.model(build.op("llmc.Linear", h, table))
    return model


def with_values_replaced(model: ir.Model) -> ir.Model:
    """The same graph of plain weights that have the quantised ones' values."""
    copy = graph.clone(model)
    for value in copy.graph.initializers.values():
        if isinstance(value.const_value, QuantizedWeight):
            value.const_value = Weight.of_array(str(value.name), value.const_value.quantized().values())
    return copy


@pytest.mark.parametrize(
    ("scheme", "n"), [(Scheme(8), 2), (Scheme(4, 32), 2), (Scheme(4, 128, lm_head=True), 3)], ids=str
)
def test_linear_layers_become_quantised(
    build: Any, golden: Callable[[object], None], feeds: Callable[[ir.Model], Any], scheme: Scheme, n: int
) -> None:
    model = layers(build)
    before, exact = graph.to_text(model), graph.evaluate(model, feeds(model))["logits"]
    assert quantize_weights(model, scheme) == n
    golden(f"{before}\n\n// quantize_weights\n\n{graph.to_text(model)}")
    found = graph.evaluate(model, feeds(model))["logits"]
    wanted = graph.evaluate(with_values_replaced(model), feeds(model))["logits"]
    np.testing.assert_array_equal(found, wanted)
    share = np.abs(found - exact).max() / np.ptp(exact)
    assert 0 < share < (0.01 if scheme.bits == 8 else 0.2)
    assert quantize_weights(model, scheme) == 0


def test_products_of_few_inputs_are_left_and_what_makes_these(build: Any) -> None:
    """As those that say how streams are mixed (Gemma 3n)."""
    x = build.input("x", "M", 32)
    few = build.op("Tanh", build.op("llmc.Linear", x, build.weight("router", 4, 32)))
    shares = build.op("Reshape", build.op("llmc.Linear", few, build.weight("shares", 4, 4)), build.constant([-1, 1, 4]))
    streams = build.op("Reshape", build.op("llmc.Linear", x, build.weight("up", 32, 32)), build.constant([-1, 4, 8]))
    y = build.op("Reshape", build.op("MatMul", shares, streams), build.constant([-1, 8]))
    model = build.model(build.op("RMSNormalization", y, build.weight("norm", 8), axis=-1))
    assert quantize_weights(model, Scheme(4, 32)) == 1
    assert [name for name in model.graph.initializers if "int4" in name] == ["up.int4"]


MXFP4 = Scheme(4, 32, number="mx")


@pytest.mark.parametrize(("scheme", "tolerance"), [(Scheme(8), 0.02), (MXFP4, 0.2)], ids=str)
def test_experts_are_quantised_and_what_chooses_them_is_not(
    build: Any, feeds: Callable[[ir.Model], Any], scheme: Scheme, tolerance: float
) -> None:
    x = build.input("x", "M", 32)
    chances = build.op("Softmax", build.op("llmc.Linear", x, build.weight("gate", 3, 32)), axis=-1)
    share, index = build.op("TopK", chances, build.constant([2]), n_results=2, axis=-1)
    y = build.op("llmc.ExpertsSilu", x, index, share, build.weight("up", 3, 64, 32), build.weight("down", 3, 32, 32))
    model = build.model(build.op("llmc.Linear", y, build.weight("head", 8, 32)))
    exact = graph.evaluate(model, feeds(model))["logits"]
    assert quantize_weights(model, scheme) == 2
    name = scheme.name
    assert {weight for weight in model.graph.initializers if name in weight} == {f"up.{name}", f"down.{name}"}
    found = graph.evaluate(model, feeds(model))["logits"]
    assert 0 < np.abs(found - exact).max() < tolerance * np.ptp(exact)
    assert quantize_weights(model, scheme) == 0


def mixture(build: Any, kept: Coded | None = None) -> ir.Model:
    """Experts behind a product that a checkpoint may keep as codes, then the logits."""
    before = Weight("before", (32, 32), lambda: np.eye(32, dtype=np.float32) / 7, "bf16", kept)
    x = build.op("llmc.Linear", build.input("x", "M", 32), build.constant(before, "before"))
    chances = build.op("Softmax", build.op("llmc.Linear", x, build.weight("gate", 3, 32)), axis=-1)
    share, index = build.op("TopK", chances, build.constant([2]), n_results=2, axis=-1)
    y = build.op("llmc.ExpertsSilu", x, index, share, build.weight("up", 3, 64, 32), build.weight("down", 3, 32, 32))
    model: ir.Model = build.model(build.op("llmc.Linear", y, build.weight("head", 40, 32)))
    return model


@pytest.mark.parametrize(
    ("kept", "lm_head", "beside"),
    [
        (None, None, {}),
        (Coded(8, 32), False, {"before": "int8"}),
        (None, True, {"head": "int8, lm_head"}),
    ],
    ids=["as they are", "codes of 8 bits", "logits"],
)
def test_beside_experts_in_mxfp4_codes_become_int8_and_so_do_logits_when_asked(
    build: Any, kept: Coded | None, lm_head: bool | None, beside: dict[str, str]
) -> None:
    model = mixture(build, kept)
    scheme = replace(MXFP4, lm_head=lm_head)
    assert quantize_weights(model, scheme) == 2 + len(beside)
    assert schemes(model) == {"up": str(scheme), "down": str(scheme), **beside}
    assert quantize_weights(model, scheme) == 0


def test_what_says_how_a_state_goes_on_is_not_quantised(build: Any) -> None:
    build.token_inputs()
    x = build.input("x", "M", 32)
    g, beta = (build.op("llmc.Linear", x, build.weight(name, 2, 32)) for name in ("a", "b"))
    gates = build.op("Neg", build.op("Softplus", g)), build.op("Sigmoid", beta)
    qkv, rows = build.op("llmc.Linear", x, build.weight("qkv", 48, 32)), build.inputs[1]
    settings = {"num_k_heads": 2, "num_v_heads": 2, "key_dim": 8, "value_dim": 8, "scale": 1.0, "epsilon": 1e-6}
    state = build.input("state.0", "n_slots", 2, 8, 8)
    operands = (qkv, *gates, rows, rows, state)
    y, _ = build.op("llmc.StatefulGatedDeltaRule", *operands, n_results=2, place=0, **settings)
    model = build.model(build.op("llmc.Linear", y, build.weight("head", 8, 16)))
    assert quantize_weights(model, Scheme(8, lm_head=True)) == 2
    assert {name for name in model.graph.initializers if "int8" in name} == {"qkv.int8", "head.int8"}


def test_both_factors_of_what_says_how_a_state_goes_on_are_left(build: Any) -> None:
    """As Kimi Linear's decay, a product of a product."""
    build.token_inputs()
    x = build.input("x", "M", 32)
    low = build.op("llmc.Linear", x, build.weight("f_a", 8, 32))
    g = build.op("Neg", build.op("Softplus", build.op("llmc.Linear", low, build.weight("f_b", 16, 8))))
    beta = build.op("Sigmoid", build.op("llmc.Linear", x, build.weight("b", 2, 32)))
    qkv, rows = build.op("llmc.Linear", x, build.weight("qkv", 48, 32)), build.inputs[1]
    settings = {"num_k_heads": 2, "num_v_heads": 2, "key_dim": 8, "value_dim": 8, "scale": 1.0, "epsilon": 1e-6}
    operands = (qkv, g, beta, rows, rows, build.input("state.0", "n_slots", 2, 8, 8))
    y, _ = build.op("llmc.StatefulChannelDeltaRule", *operands, n_results=2, place=0, **settings)
    model = build.model(build.op("llmc.Linear", y, build.weight("head", 8, 16)))
    assert quantize_weights(model, Scheme(8, lm_head=True)) == 2
    assert {name for name in model.graph.initializers if "int8" in name} == {"qkv.int8", "head.int8"}


def test_what_goes_into_a_scan_beside_its_text_is_not_quantised(build: Any) -> None:
    build.token_inputs()
    x, rows = build.input("x", "M", 32), build.inputs[1]
    wide, gate = (build.op("llmc.Linear", x, build.weight(name, 16, 32)) for name in ("in", "gate"))
    step, b, c = build.op("Split", build.op("llmc.Linear", wide, build.weight("x_proj", 12, 16)),
                          build.constant([4, 4, 4]), axis=1, n_results=3)  # fmt: skip
    dt = build.op("llmc.Linear", step, build.weight("dt_proj", 16, 4))
    constants = build.weight("rate", 16, 4), build.weight("bias", 16), build.weight("skip", 16)
    operands = (wide, dt, gate, b, c, *constants, rows, rows, build.input("state.0", "n_slots", 16, 4))
    y, _ = build.op("llmc.StatefulSelectiveScan", *operands, n_results=2, place=0)
    model = build.model(build.op("llmc.Linear", y, build.weight("head", 8, 16)))
    assert quantize_weights(model, Scheme(8, lm_head=True)) == 3
    assert {name for name in model.graph.initializers if "int8" in name} == {"in.int8", "gate.int8", "head.int8"}


def test_mxfp4_is_for_experts_alone(build: Any) -> None:
    model = build.model(build.op("llmc.Linear", build.input("x", "M", 32), build.weight("head", 8, 32)))
    with pytest.raises(LlmcError, match="mxfp4 is for the weights of experts, and the model has none"):
        quantize_weights(model, MXFP4)


def test_embedding_norm_and_bias_stay(build: Any) -> None:
    model = layers(build)
    quantize_weights(model, Scheme(4, 32, lm_head=True))
    quantised = {name for name, v in model.graph.initializers.items() if isinstance(v.const_value, QuantizedWeight)}
    assert quantised == {"mlp.weight.int4", "down.weight.int4", "embed.weight.int4"}
    assert set(model.graph.initializers) - quantised == {"embed.weight", "norm.weight", "down.bias"}


def test_no_weight_is_read(build: Any) -> None:
    def read() -> Any:
        raise AssertionError("the pass read a weight")

    x = build.input("x", "M", 8)
    hidden = build.op("llmc.LinearRelu", x, build.constant(Weight("w", (8, 8), read, "bf16"), "w"))
    model = build.model(build.op("llmc.Linear", hidden, build.constant(Weight("head", (8, 8), read), "head")))
    assert quantize_weights(model, Scheme(8)) == 1


def test_a_weight_of_two_layers_is_stored_once(build: Any) -> None:
    x, w = build.input("x", "M", 8), build.weight("w", 8, 8)
    hidden = build.op("llmc.LinearSilu", build.op("llmc.LinearRelu", x, w), w)
    model = build.model(build.op("llmc.Linear", hidden, build.weight("head", 8, 8)))
    assert quantize_weights(model, Scheme(8)) == 2
    assert set(model.graph.initializers) == {"w.int8", "head"}


def test_the_product_that_makes_the_logits_is_found_behind_what_follows_it(build: Any, refused: Any) -> None:
    logits = build.op("llmc.Linear", build.input("x", "M", 8), build.weight("head", 8, 8))
    cap = build.constant(30.0)
    refused(build.model(build.op("Mul", build.op("Tanh", build.op("Div", logits, cap)), cap)), INT4)


def test_a_model_that_ends_with_a_norm_makes_no_logits(build: Any) -> None:
    """One for embeddings: what its norm is given is the sum of what all layers add."""
    h = build.input("x", "M", 32)
    for name in ("first", "second"):
        h = build.op(
            "llmc.AddRMSNorm",
            build.op("llmc.Linear", h, build.weight(name, 32, 32)),
            h,
            build.weight(f"{name}.norm", 32),
            n_results=2,
            epsilon=1e-5,
        )[0]
    h = build.op("RMSNormalization", h, build.weight("norm", 32), axis=-1, epsilon=1e-5)
    model = build.model(h)
    assert INT4(model) == 2


def test_a_weight_that_is_computed_is_refused(build: Any, refused: Any) -> None:
    x, w = build.input("x", "M", 8), build.input("w", 8, 8)
    hidden = build.op("llmc.LinearRelu", x, w)
    refused(build.model(build.op("llmc.Linear", hidden, build.weight("head", 8, 8))), INT4)


def test_a_weight_that_layers_share_is_fitted_once(build: Any) -> None:
    tokens, _ = build.token_inputs()
    x = build.op("Gather", build.weight("embed", 12, 32), tokens, axis=0)
    shared = build.weight("shared", 32, 32)
    h = build.op("llmc.LinearSilu", build.op("llmc.LinearRelu", x, shared), shared)
    h = build.op("llmc.LinearRelu", h, build.weight("own", 32, 32))
    model = build.model(build.op("llmc.Linear", h, build.weight("head", 9, 32)))
    quantize_weights(model, Scheme(4, 32))
    run = Fitting(model.graph, Calibration("", "", (np.arange(12),)))
    assert [str(weight.name) for weight, _ in run.run()] == ["shared.int4", "own.int4"]


AS_KEPT = {
    "plain": None,
    "q4_k": Coded(4, 32, zeros=True),
    "awq": Coded(4, 128, zeros=True),
    "q4_0": Coded(4, 32),
    "q2_k": Coded(2, 16, zeros=True),
    "in act-order": Coded(4, 0, zeros=True),
}
"""Weights in 4 bits or fewer."""


def kept_so(build: Any, coded: dict[str, Coded | None]) -> ir.Model:
    """Layers one after the other, of weights that a checkpoint keeps so."""
    h = build.input("x", "M", 32)
    for name, how in coded.items():
        weight = Weight(name, (32, 32), lambda: np.eye(32, dtype=np.float32) / 7, "bf16", how)
        h = build.op("llmc.LinearRelu", h, build.constant(weight, name))
    model: ir.Model = build.model(build.op("llmc.Linear", h, build.weight("head", 9, 32)))
    return model


def schemes(model: ir.Model) -> dict[str, str]:
    found = [value.const_value for value in model.graph.initializers.values()]
    return {str(w.source.name): str(w.scheme) for w in found if isinstance(w, QuantizedWeight)}


def test_where_8_bits_are_worth_it_is_measured_a_checkpoints_wider_codes_do_not_say_so(build: Any) -> None:
    model = kept_so(build, {**AS_KEPT, "q6_k": Coded(6, 16), "q5_k": Coded(5, 32, zeros=True)})
    quantize_weights(model, Scheme(4, 32, most_bits=5.0, wide=frozenset(["plain", "q5_k"])))
    found = schemes(model)
    assert {name for name, scheme in found.items() if scheme == "int8"} == {"plain", "q5_k"}
    assert found["q6_k"].startswith("int4")


def test_codes_with_zeros_keep_them_and_wider_ones_are_in_int8_beside_them(
    build: Any, golden: Callable[[object], None], feeds: Callable[[ir.Model], Any]
) -> None:
    model = kept_so(build, {**AS_KEPT, "q6_k": Coded(6, 16), "q5_k": Coded(5, 32, zeros=True)})
    before = graph.to_text(model)
    assert quantize_weights(model, Scheme(4, 32)) == 8
    golden(f"{before}\n\n// quantize_weights\n\n{graph.to_text(model)}")
    plain, zeros = "int4, groups of 32", "int4, groups of 32, zeros"
    with_zeros = dict.fromkeys(("q4_k", "awq"), zeros)
    assert schemes(model) == dict.fromkeys(AS_KEPT, plain) | with_zeros | {"q6_k": "int8", "q5_k": "int8"}
    found = graph.evaluate(model, feeds(model))["logits"]
    wanted = graph.evaluate(with_values_replaced(model), feeds(model))["logits"]
    np.testing.assert_array_equal(found, wanted)
    assert quantize_weights(model, Scheme(4, 32)) == 0


@pytest.mark.parametrize(
    ("scheme", "coded", "wanted"),
    [
        (Scheme(4, 128), {"q4_k": AS_KEPT["q4_k"]}, "int4, groups of 128"),
        (Scheme(4, 128), {"awq": AS_KEPT["awq"]}, "int4, groups of 128, zeros"),
        (Scheme(8), AS_KEPT, "int8"),
        (Scheme(4, 32), {"q8_0": Coded(8, 32)}, "int4, groups of 32"),  # int4 is asked for, and all are wider
        (Scheme(4, 32), {"q5_k": Coded(5, 32, zeros=True), "q6_k": Coded(6, 16)}, "int4, groups of 32"),
    ],
)
def test_other_schemes_and_checkpoints_have_one_for_all(
    build: Any, scheme: Scheme, coded: dict[str, Coded | None], wanted: str
) -> None:
    model = kept_so(build, coded)
    quantize_weights(model, scheme)
    assert set(schemes(model).values()) == {wanted}


def test_experts_have_zeros_and_int8_as_their_checkpoint_has(build: Any) -> None:
    x = build.input("x", "M", 32)
    share, index = build.op("TopK", x, build.constant([2]), n_results=2, axis=-1)
    up, down = (
        build.constant(Weight(name, (32, rows, 32), lambda: np.zeros(0), "bf16", how), name)
        for name, rows, how in (("up", 64, Coded(4, 32, zeros=True)), ("down", 32, Coded(6, 16)))
    )
    y = build.op("llmc.ExpertsSilu", x, index, share, up, down)
    model = build.model(build.op("llmc.Linear", y, build.weight("head", 8, 32)))
    assert quantize_weights(model, Scheme(4, 32)) == 2
    assert schemes(model) == {"up": "int4, groups of 32, zeros", "down": "int8"}


@pytest.mark.parametrize(
    ("scheme", "n_logits", "kept", "wanted"),
    [
        (Scheme(8), 40, None, "int8"),
        (Scheme(4, 32), 40, None, "int8"),
        (Scheme(8, number="fp"), 40, None, "int8"),
        (Scheme(8), 8, Coded(6, 16), "int8"),
        (Scheme(4, 32), 8, Coded(8, 32), "int8"),  # though most are 8 bits, and the others become int4
        (Scheme(4, 128), 8, Coded(4, 32), "int8"),
        (Scheme(8), 8, None, None),
        (Scheme(8), 32, None, None),
        (Scheme(4, 32, lm_head=False), 40, Coded(6, 16), None),
        (Scheme(4, 32, lm_head=True), 40, Coded(8, 32), "int4, groups of 32, lm_head"),
    ],
    ids=str,
)
def test_logits_of_a_vocabulary_are_made_in_8_bits_and_those_of_labels_where_a_checkpoint_keeps_them_small(
    build: Any, scheme: Scheme, n_logits: int, kept: Coded | None, wanted: str | None
) -> None:
    """Unless somebody says otherwise; a note says what became of them if nobody has."""
    body = Weight("body", (32, 32), lambda: np.ones((32, 32), np.float32), "bf16", Coded(8, 32))
    x = build.op("llmc.LinearRelu", build.input("x", "M", 32), build.constant(body, "body"))
    head = Weight("head", (n_logits, 32), lambda: np.ones((n_logits, 32), np.float32), "bf16", kept)
    model = build.model(build.op("llmc.Linear", x, build.constant(head, "head")))
    assert quantize_weights(model, scheme) == 1 + (wanted is not None)
    assert schemes(model).get("head") == wanted
    assert are_logits_quantized(model) == (wanted is not None)
    said = notes_of_logits(model, "bf16")
    if scheme.lm_head is None and wanted:
        of = f", which the checkpoint keeps in {kept.bits} bits," if kept else ""
        assert said == [f"the product that makes the logits{of} is {wanted}: --no-quant-lm-head makes it bf16"]
    else:
        assert said == []

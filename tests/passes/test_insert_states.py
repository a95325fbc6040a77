"""passes/insert_states.py"""

from typing import Any

import numpy as np
import pytest

from llmc.compiler import graph
from llmc.compiler.weights import Weight
from llmc.passes.insert_states import insert_states

KH, VH, DK, DV, TAPS, LENGTH = 2, 4, 8, 6, 4, 11
WIDTH = 2 * KH * DK + VH * DV
SIZES = [KH * DK, KH * DK, VH * DV]


def conv_model(build: Any) -> Any:
    build.token_inputs()
    x = build.input("x", "M", WIDTH)
    return build.model(build.op("llmc.CausalConv", x, build.weight("w", WIDTH, TAPS), silu=1))


def biased_model(build: Any) -> Any:
    build.token_inputs()
    x = build.input("x", "M", WIDTH)
    weights = build.weight("w", WIDTH, TAPS), build.weight("b", WIDTH)
    return build.model(build.op("llmc.CausalConvBias", x, *weights, silu=0))


def rule(build: Any, parts: Any) -> Any:
    heads = [(KH, DK), (KH, DK), (VH, DV)]
    q, k, v = (build.op("Reshape", x, build.constant([-1, *size])) for x, size in zip(parts, heads, strict=True))
    g, beta = (build.op("Sigmoid", build.input(name, "M", VH)) for name in ("g", "beta"))
    return build.op("llmc.GatedDeltaRule", q, k, v, build.op("Neg", g), beta, scale=0.4, epsilon=1e-6)


def rule_model(build: Any) -> Any:
    """One value that queries, keys and values are cut from."""
    build.token_inputs()
    x = build.input("x", "M", WIDTH)
    return build.model(rule(build, build.op("Split", x, build.constant(SIZES), axis=1, n_results=3)))


def channel_model(build: Any) -> Any:
    """A rule whose state decays by another factor for each of the key's elements."""
    build.token_inputs()
    parts = build.op("Split", build.input("x", "M", WIDTH), build.constant(SIZES), axis=1, n_results=3)
    heads = [(KH, DK), (KH, DK), (VH, DV)]
    q, k, v = (build.op("Reshape", x, build.constant([-1, *size])) for x, size in zip(parts, heads, strict=True))
    g = build.op("Neg", build.op("Sigmoid", build.input("g", "M", VH, DK)))
    beta = build.op("Sigmoid", build.input("beta", "M", VH))
    return build.model(build.op("llmc.ChannelDeltaRule", q, k, v, g, beta, scale=0.4, epsilon=1e-6))


def separate_model(build: Any) -> Any:
    build.token_inputs()
    x = build.input("x", "M", WIDTH)
    parts = build.op("Split", x, build.constant(SIZES), axis=1, n_results=3)
    return build.model(rule(build, [build.op("Tanh", part) for part in parts]))


def scan_model(build: Any) -> Any:
    build.token_inputs()
    x, dt, gate = (build.input(name, "M", 10) for name in ("x", "dt", "gate"))
    b, c = (build.input(name, "M", DK) for name in "bc")
    rate = build.constant(Weight.of_array("rate", -np.linspace(0.1, 2, 10 * DK, dtype=np.float32).reshape(10, DK)))
    vectors = build.weight("bias", 10), build.weight("skip", 10)
    return build.model(build.op("llmc.SelectiveScan", x, dt, gate, b, c, rate, *vectors))


def both_model(build: Any) -> Any:
    """A rule behind its convolution, as models have them."""
    build.token_inputs()
    x = build.input("x", "M", WIDTH)
    y = build.op("llmc.CausalConv", x, build.weight("w", WIDTH, TAPS), silu=1)
    return build.model(rule(build, build.op("Split", y, build.constant(SIZES), axis=1, n_results=3)))


MODELS = {
    "conv": (conv_model, 1),
    "biased": (biased_model, 1),
    "rule": (rule_model, 1),
    "channel": (channel_model, 1),
    "separate": (separate_model, 1),
    "scan": (scan_model, 1),
    "both": (both_model, 2),
}


@pytest.mark.parametrize("kind", MODELS)
def test_layers_find_their_state_in_a_slot_and_leave_it_there(build: Any, golden: Any, kind: str) -> None:
    make, n_states = MODELS[kind]
    model, random = make(build), np.random.default_rng(0)
    feeds = {
        str(value.name): random.normal(size=(LENGTH, *value.shape[1:])).astype(np.float32)
        for value in model.graph.inputs
        if value.name not in ("tokens", "positions")
    }
    step = {"tokens": np.zeros(LENGTH, np.int64), "positions": np.arange(LENGTH)}
    wanted = graph.evaluate(model, feeds | step)["logits"]
    before = graph.to_text(model)
    assert insert_states(model) == n_states
    golden(f"{before}\n\n// insert_states\n\n{graph.to_text(model)}")
    assert insert_states(model) == 0

    run, names = graph.runner(model), [f"state.{i}" for i in range(n_states)]
    shapes = {str(value.name): value.shape[1:] for value in model.graph.inputs if value.name in names}
    kept = {name: random.normal(size=(3, *shape)).astype(np.float32) for name, shape in shapes.items()}
    found = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, LENGTH)):
        part = {name: array[rows] for name, array in (feeds | step).items()}
        n = len(part["positions"])
        results = run(part | kept | {"slots": np.full(n, 2), "page_table": np.zeros((n, 1), np.int64)})
        found.append(results["logits"])
        kept = {name: results[f"{name}_out"] for name in names}
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=2e-6)


def test_a_model_without_states_gets_no_slots(build: Any, refused: Any) -> None:
    build.token_inputs()
    refused(build.model(build.op("Relu", build.input("x", "M", 8))), insert_states)

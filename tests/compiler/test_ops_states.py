"""Operators of layers with a state: their definitions against their equations, and rows that go on from slots."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler import ops
from tests.compiler.test_ops import ACTIVATIONS, SETTINGS, Array, M, N, inputs_of, run


def gated_rule(q: Array, k: Array, v: Array, g: Array, beta: Array, delta: bool) -> Array:
    """q, k [S, KH, DK], v [S, H, DV], g [S, H] or [S, H, DK], beta [S, H] -> [S, H, DV]."""
    if delta:
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + SETTINGS["epsilon"]) for x in (q, k))
    q, k = (x.repeat(v.shape[1] // x.shape[1], 1) for x in (q, k))
    state, y = np.zeros((v.shape[1], k.shape[2], v.shape[2])), np.zeros_like(v)
    for t in range(len(v)):
        state *= np.exp(g[t]).reshape(v.shape[1], -1, 1)
        news = beta[t][:, None] * (v[t] - delta * np.einsum("hk,hkv->hv", k[t], state))
        state += np.einsum("hk,hv->hkv", k[t], news)
        y[t] = SETTINGS["scale"] * np.einsum("hk,hkv->hv", q[t], state)
    return y


@pytest.mark.parametrize("op", ops.GATED_RULES)
def test_a_gated_rule_is_its_equation(op: str) -> None:
    feeds = inputs_of(op)
    (found,) = run(op, feeds)
    for sequence in range(2):
        q, k, v, g, beta = (feeds[name][:, sequence] for name in ("q", "k", "v", "g", "beta"))
        wanted = gated_rule(q, k, v, g, beta, op != "SelectiveRule")
        np.testing.assert_allclose(found[:, sequence], wanted, rtol=0, atol=2e-6 * max(1.0, np.abs(wanted).max()))


def test_a_selective_scan_is_its_equation() -> None:
    feeds = inputs_of("SelectiveScan")
    feeds["rate"] = -np.abs(feeds["rate"])
    (found,) = run("SelectiveScan", feeds)
    rate, bias, skip = (feeds[name] for name in ("rate", "bias", "skip"))
    for sequence in range(2):
        x, dt, gate, b, c = (feeds[name][:, sequence] for name in ("x", "dt", "gate", "b", "c"))
        state, d = np.zeros(rate.shape), np.log1p(np.exp(dt + bias))
        for t in range(M):
            state = np.exp(d[t][:, None] * rate) * state + np.outer(d[t] * x[t], b[t])
            wanted = (state @ c[t] + skip * x[t]) * ACTIVATIONS["Silu"](gate[t])
            np.testing.assert_allclose(found[t, sequence], wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("silu", [0, 1])
def test_a_convolution_is_its_equation(silu: int) -> None:
    feeds = inputs_of("CausalConvBias")
    (found,) = run("CausalConvBias", feeds, silu=silu)
    before = np.concatenate([np.zeros((3, 2, N), np.float32), feeds["x"]])
    wanted = sum(before[tap : tap + M] * feeds["weight"][:, tap] for tap in range(4)) + feeds["bias"]
    np.testing.assert_allclose(found, ACTIVATIONS["Silu"](wanted) if silu else wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("op", ops.STATEFUL)
def test_rows_go_on_where_their_sequence_has_left_off(op: str) -> None:
    """Two sequences, their rows in one step and in steps of their own; nothing of a padded row is seen."""
    feeds = inputs_of(op) | {"positions": np.array([0, 1, 7, -1, 8, 2]), "slots": np.array([2, 2, 0, -1, 0, 2])}
    together, states = run(op, feeds)
    kept = feeds["state"].copy()
    for row in range(M):
        one = {name: x[row : row + 1] if x.shape[0] == M else x for name, x in feeds.items()} | {"state": kept}
        y, kept = run(op, one)
        np.testing.assert_array_equal(y[0], together[row])
    np.testing.assert_array_equal(kept, states)
    np.testing.assert_array_equal(kept[1], feeds["state"][1])
    assert not together[3].any()
    anew, _ = run(op, feeds | {"state": feeds["state"] + (np.arange(3) == 2).reshape(3, *[1] * (kept.ndim - 1))})
    np.testing.assert_array_equal(anew, together)  # a first token finds zeros

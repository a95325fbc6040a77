"""compiler/ops/low_rank.py: what adapters add is its equation, of halves and strips, normalised or not."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.compiler import ops
from llmc.compiler.kernel import STRIP
from tests.compiler.test_ops import ACTIVATIONS, ADAPTERS, Array, K, M, N, inputs_of, run


@pytest.mark.parametrize("activation", ["", "Silu", "Gelu", "GeluTanh"])
def test_low_rank_is_its_equation(activation: str) -> None:
    op = ops.low_rank_name(activation)
    feeds = inputs_of(op)
    np.testing.assert_allclose(run(op, feeds)[0], with_low_rank(activation, feeds), rtol=0, atol=2e-5)


def with_low_rank(activation: str, feeds: dict[str, Array]) -> Array:
    y, x, a, b = (feeds[name] for name in ("y", "x", "a", "b"))
    wanted, n = y.copy(), y.shape[1]
    for m, adapter in enumerate(ADAPTERS):
        for part, columns in enumerate((slice(0, N - 2), slice(N - 2, n))):
            if adapter >= 0:
                wanted[m, columns] += b[adapter, columns] @ (a[adapter, 3 * part : 3 * part + 3] @ x[m])
    return ACTIVATIONS[activation](wanted[:, : n // 2]) * wanted[:, n // 2 :] if activation else wanted


@pytest.mark.parametrize("norm", ["", "RMSNorm", "LayerNorm"])
def test_low_rank_of_a_norm_and_of_strips_is_that_of_the_halves(norm: str) -> None:
    op = ops.low_rank_name("Silu", norm, strips=True)
    feeds = inputs_of(op)
    halves = feeds | {"y": feeds["y"].reshape(M, -1, 2, STRIP).swapaxes(1, 2).reshape(M, -1)}
    if norm:
        normed = f"{norm}Linear"
        names = ops.OPERATORS[normed].inputs
        halves["x"] = run(normed, {name: (feeds | {"weight": np.eye(K, dtype=np.float32)})[name] for name in names})[0]
    found = run(op, feeds)[0]
    np.testing.assert_allclose(found, with_low_rank("Silu", halves), rtol=1e-5, atol=2e-5)


def test_a_product_in_strips_is_the_gated_one_before_its_gate() -> None:
    feeds = inputs_of("LinearStripsBias")
    strips = run("LinearStripsBias", feeds)[0].reshape(M, -1, 2, STRIP)
    gate, up = (strips[:, :, half].reshape(M, -1) for half in range(2))
    (wanted,) = run("GatedLinearSiluBias", feeds)
    np.testing.assert_allclose(ACTIVATIONS["Silu"](gate) * up, wanted, rtol=0, atol=2e-5)

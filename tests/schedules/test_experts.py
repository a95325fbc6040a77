"""Mixtures of experts: the bits of linear layers, whatever is chosen and computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType, numpy_dtype
from llmc.compiler.quantization.quantize import Quantized, Scheme, quantize
from llmc.compiler.target import LEVELS, Target, host_features
from llmc.runtime.errors import LlmcError
from llmc.schedules.cpu.experts.rule import Table, match
from llmc.schedules.cpu.linear.panel_layout import Panels
from llmc.schedules.experts_layout import OfExperts

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

SCHEMES = {"i8": Scheme(8), "i4": Scheme(4, 32), "z4": Scheme(4, 32, zeros=True), "m4": Scheme(4, 32, number="mx")}
VECTORS = [
    Target("cpu", level)
    for level, features in LEVELS.items()
    if host_features().issuperset(features) and "amx" not in level
]
"""Levels on which linear layers are multiplied in vectors, as experts are on all."""


class Stacked(Quantized):
    """The weights of several experts."""

    n_experts = 1

    @property
    def shape(self) -> Any:
        rows, k = self.codes.shape
        return self.n_experts, rows // self.n_experts, k


CLAMP = {"alpha": 1.702, "limit": 0.75, "offset": 1.0}


def experts_call(m: int, chosen: int, n_experts: int, n: int, k: int, dtype: Any, activation: str = "Silu") -> Call:
    """x [m, k] to y [m, k], each token through `chosen` of n_experts of width n."""
    weights = [((n_experts, 2 * n, k), dtype), ((n_experts, k, n), dtype)]
    group = 32 if dtype in ("i4", "z4", "m4") else 0
    inputs = [TensorType((m, k), "f32"), TensorType((m, chosen), "i64"), TensorType((m, chosen), "f32")]
    inputs += [TensorType(shape, kind, constant=True, group=group) for shape, kind in weights]
    if activation.endswith("Bias"):
        inputs += [TensorType(shape, "f32", constant=True) for shape in ((n_experts, 2 * n), (n_experts, k))]
    attributes = tuple(CLAMP.items()) if activation.startswith("Clamped") else ()
    return Call(f"llmc.Experts{activation}", tuple(inputs), (TensorType((m, k), "f32"),), attributes)


def random_inputs(call: Call) -> list[Any]:
    """x, index, share, and both weights as they are stored."""
    generator = np.random.default_rng(0)
    x, index, share, *weights = call.inputs
    assert x
    assert index
    assert share
    n_experts = weights[0].shape[0] if weights[0] else 0
    chosen = np.stack([generator.permutation(n_experts)[: index.shape[1]] for _ in range(index.shape[0])])
    made: list[Any] = [generator.standard_normal(x.shape).astype(np.float32), chosen]
    made.append(generator.random(share.shape).astype(np.float32))
    for kind in weights:
        assert kind
        array = (generator.standard_normal(kind.shape) * kind.shape[-1] ** -0.5).astype(np.float32)
        made.append(stored(array, kind.dtype))
    return made


def stored(array: Array, dtype: str) -> Any:
    if dtype not in SCHEMES:
        return array.astype(numpy_dtype(dtype))
    codes = quantize(array.reshape(-1, array.shape[-1]), SCHEMES[dtype])
    result = Stacked(codes.codes, codes.scales, codes.scheme, zeros=codes.zeros)
    object.__setattr__(result, "n_experts", len(array))
    return result


def by_linear_layers(run: Run, call: Call, inputs: list[Any], target: Target) -> Array:
    """What linear layers of the same kind give: each expert for every token, then the sums in order."""
    x, index, share, *weights = inputs
    kinds = call.inputs[3:]
    results = []
    for expert in range(len(weights[0]) if isinstance(weights[0], np.ndarray) else weights[0].n_experts):
        rows = x
        for op, kind, weight in zip(("GatedLinearSilu", "Linear"), kinds, weights, strict=True):
            assert kind
            one = TensorType(kind.shape[1:], kind.dtype, constant=True, group=kind.group)
            n = one.shape[0] // (2 if op.startswith("Gated") else 1)
            layer = Call(f"llmc.{op}", (TensorType(rows.shape, "f32"), one), (TensorType((len(rows), n), "f32"),))
            (rows,) = run(layer, rows, of_expert(weight, expert), target=target)
        results.append(rows)
    y: Array = np.zeros(x.shape, np.float32)
    for j in range(index.shape[1]):
        for m, expert in enumerate(index[:, j]):
            exact = share[m, j].astype(np.float64) * results[expert][m]
            y[m] = (y[m] + exact).astype(np.float32)
    return y


def of_expert(weight: Any, expert: int) -> Any:
    if isinstance(weight, np.ndarray):
        return weight[expert]
    n = weight.shape[1]
    part = slice(expert * n, (expert + 1) * n)
    return weight.rows(part)


@pytest.mark.parametrize(
    ("dtype", "target"),
    [("f32", VECTORS[0]), ("bf16", VECTORS[-1]), ("i8", VECTORS[0]), ("i4", VECTORS[-1]), ("z4", VECTORS[-1])],
    ids=str,
)
def test_every_token_has_the_bits_that_linear_layers_give(run: Run, dtype: str, target: Target) -> None:
    call = experts_call(9, 2, 5, 40, 100, dtype)
    inputs = random_inputs(call)
    (y,) = run(call, *inputs, target=target, n_tasks=3)
    wanted = by_linear_layers(run, call, inputs, target)
    np.testing.assert_array_equal(y.view(np.uint32), wanted.view(np.uint32))


def test_both_weights_may_be_stored_differently(run: Run, host: Target) -> None:
    """Of a file that keeps most in 4 bits, and some of the experts' downs in more."""
    call = experts_call(9, 2, 5, 40, 128, "z4")
    down = call.inputs[4]
    assert down
    call = replace(call, inputs=(*call.inputs[:4], replace(down, dtype="i8", group=0)))
    inputs = random_inputs(call)
    (y,) = run(call, *inputs, target=host, n_tasks=3)
    np.testing.assert_array_equal(y.view(np.uint32), by_linear_layers(run, call, inputs, host).view(np.uint32))


def test_a_token_has_the_same_bits_alone_and_in_any_company(run: Run, host: Target) -> None:
    whole = experts_call(40, 3, 6, 24, 2500, "bf16")
    x, index, share, *weights = random_inputs(whole)
    index[10:35] = [2, 4, 0]  # some experts have many tokens, and one so many that its sums wait
    (expected,) = run(whole, x, index, share, *weights, target=host, n_tasks=5)
    for m, first in [(1, 39), (5, 8)]:
        part = slice(first, first + m)
        call = experts_call(m, 3, 6, 24, 2500, "bf16")
        (y,) = run(call, x[part], index[part], share[part], *weights, target=host, n_tasks=2)
        np.testing.assert_array_equal(y.view(np.uint32), expected[part].view(np.uint32))


@pytest.mark.parametrize(
    ("m", "chosen", "n_experts", "n", "k", "activation"),
    [
        (5, 1, 1, 17, 33, "Silu"),
        (4, 4, 4, 16, 64, "Gelu"),
        (1, 2, 7, 48, 16, "GeluTanh"),
        (9, 2, 3, 40, 72, "ClampedSwishBias"),
    ],
)
def test_odd_shapes_are_what_the_definition_says(
    run: Run, define: Run, host: Target, m: int, chosen: int, n_experts: int, n: int, k: int, activation: str
) -> None:
    call = experts_call(m, chosen, n_experts, n, k, "f32", activation)
    inputs = random_inputs(call)
    (y,), (wanted,) = run(call, *inputs, target=host, n_tasks=2), define(call, *inputs)
    np.testing.assert_allclose(y, wanted, atol=4e-6)


def test_any_choice_stays_within_memory(run: Run, define: Run, host: Target) -> None:
    """One expert for all; one twice for a token; numbers of no expert, which count as the nearest."""
    call = experts_call(5, 2, 4, 16, 32, "f32")
    x, _, share, *weights = random_inputs(call)
    for numbers in ([2, 3], [2, 2], [1, 0]):
        index = np.tile(np.array(numbers), (5, 1))
        (y,) = run(call, x, index, share, *weights, target=host, n_tasks=2)
        np.testing.assert_allclose(y, define(call, x, index, share, *weights)[0], atol=4e-6)
    outside, inside = np.tile(np.array([-3, 1 << 40]), (5, 1)), np.tile(np.array([0, 3]), (5, 1))
    given, nearest = (run(call, x, index, share, *weights, target=host)[0] for index in (outside, inside))
    np.testing.assert_array_equal(given, nearest)


@pytest.mark.parametrize("target", [VECTORS[0], VECTORS[-1]], ids=str)
def test_experts_in_mxfp4_may_have_biases_and_a_clamped_gate(run: Run, define: Run, target: Target) -> None:
    call = experts_call(9, 2, 3, 40, 96, "m4", "ClampedSwishBias")
    x, index, share, *weights = random_inputs(call)
    (y,) = run(call, x, index, share, *weights, target=target, n_tasks=2)
    values = [Quantized(w.codes, w.scales, w.scheme).values().reshape(w.shape) for w in weights[:2]]
    (wanted,) = define(call, x, index, share, *values, *weights[2:])
    np.testing.assert_allclose(y, wanted, atol=0.01 * np.abs(wanted).max())


@pytest.mark.parametrize(("tokens", "chosen", "experts", "rows"), [(1, 8, 64, 1), (9, 2, 5, 8), (512, 8, 64, 14)])
def test_there_is_room_for_the_tiles_of_every_choice(tokens: int, chosen: int, experts: int, rows: int) -> None:
    table = Table(tokens, chosen, experts, rows)
    generator = np.random.default_rng(0)
    for spread in (1, 2, experts):
        counts = np.bincount(generator.integers(0, spread, table.pairs), minlength=experts)
        assert (counts > 0).sum() <= table.active
        assert (-(-counts // rows)).sum() <= table.tiles
        assert -(-counts.max() // rows) <= table.tiles_of_one


def test_one_token_reads_the_weights_of_its_experts_alone() -> None:
    call = experts_call(1, 8, 64, 1024, 2048, "bf16")
    launches = schedules.implement(call, Target("cpu", "x86-64-v4+bf16")).launches
    n_bytes = [launch.n_bytes for launch in launches if launch.kernel.name.startswith("experts")]
    assert n_bytes == [8 * 2 * 2048 * 2048 + 4 * 8 * 3072, 8 * 2 * 1024 * 2048 + 4 * 8 * 3072]


def test_experts_that_are_too_large_are_refused_in_a_line(host: Target) -> None:
    """DeepSeek V3's in bf16."""
    with pytest.raises(LlmcError, match=r"take 14\.0 GiB; less than 8"):
        match(experts_call(1, 8, 256, 2048, 7168, "bf16"), host)
    assert match(experts_call(1, 8, 256, 2048, 7168, "i8"), host)


def test_experts_lie_one_after_the_other() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 40, 33)).astype(np.float32)
    layout = OfExperts(Panels("bf16", 2), 3)
    packed = layout.pack(weight)
    assert packed.nbytes == layout.n_bytes(weight.shape)
    np.testing.assert_array_equal(packed, np.concatenate([Panels("bf16", 2).pack(expert) for expert in weight]))

"""Layers with a state: their kernels against their definitions, and the promise of the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, TensorType
from llmc.compiler.target import Target

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]
M, N_SLOTS = 9, 3
POSITIONS = np.array([0, 1, 2, -1, 5, 6, 0, 7, 3])
SLOTS = np.array([1, 1, 1, -1, 2, 2, 0, 2, 1])
"""Three sequences, one of them older than the step; a row that pads it; a sequence whose rows are not together."""

CONVS = [
    ("llmc.StatefulCausalConv", 48, 4, 1),
    ("llmc.StatefulCausalConvBias", 130, 3, 0),
    ("llmc.StatefulCausalConv", 7, 2, 1),
]
RULES = [(2, 4, 24, 48, "GatedDelta"), (1, 3, 7, 5, "GatedDelta"), (2, 2, 128, 128, "GatedDelta")]
RULES += [(2, 4, 16, 24, "Selective"), (1, 2, 128, 64, "Selective")]
RULES += [(2, 4, 24, 48, "ChannelDelta"), (3, 3, 7, 5, "ChannelDelta"), (2, 2, 128, 128, "ChannelDelta")]
"""(channels, taps, silu); (heads of keys, of values, their sizes, the kind of rule)"""


def conv_call(op: str, channels: int, taps: int, silu: int, dtype: DType = "f32") -> Call:
    x, rows = TensorType((M, channels), "f32"), TensorType((M,), "i32")
    vectors = [TensorType((channels, taps), dtype, constant=True)]
    vectors += [TensorType((channels,), dtype, constant=True)] if op.endswith("Bias") else []
    state = TensorType((N_SLOTS, taps - 1, channels), "f32")
    settings = (("silu", silu), ("slot_bytes", (4 * (taps - 1) * channels + 63) // 64 * 64))
    return Call(op, (x, *vectors, rows, rows, state), (x, state), settings)


def rule_call(
    key_heads: int, value_heads: int, key_dim: int, value_dim: int, kind: str = "GatedDelta", own_gates: bool = False
) -> Call:
    qkv = TensorType((M, 2 * key_heads * key_dim + value_heads * value_dim), "f32")
    gates, rows = TensorType((M, value_heads), "f32"), TensorType((M,), "i32")
    decays = TensorType((M, value_heads * key_dim), "f32") if kind == "ChannelDelta" else gates
    state = TensorType((N_SLOTS, value_heads, key_dim, value_dim), "f32")
    sizes = {"num_k_heads": key_heads, "num_v_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
    settings = sizes | {
        "scale": key_dim**-0.5,
        **({} if kind == "Selective" else {"epsilon": 1e-6}),
        "slot_bytes": (state.n_bytes // N_SLOTS + 63) // 64 * 64,
    }
    out = TensorType((M, value_heads * value_dim), "f32")
    vectors = (TensorType((value_heads,), "f32", constant=True),) * (2 * own_gates)
    return Call(
        f"llmc.Stateful{kind}Rule{'Softplus' * own_gates}",
        (qkv, decays, gates, *vectors, rows, rows, state),
        (out, state),
        tuple(sorted(settings.items())),
    )


def scan_call(channels: int, size: int, dtype: DType = "f32") -> Call:
    x, states, rows = TensorType((M, channels), "f32"), TensorType((M, size), "f32"), TensorType((M,), "i32")
    vector = TensorType((channels,), dtype, constant=True)
    state = TensorType((N_SLOTS, channels, size), "f32")
    settings = (("slot_bytes", (4 * channels * size + 63) // 64 * 64),)
    constants = TensorType((channels, size), "f32", constant=True), vector, vector
    operands = (x, x, x, states, states, *constants, rows, rows, state)
    return Call("llmc.StatefulSelectiveScan", operands, (x, state), settings)


SCANS = [(128, 16), (80, 8), (7, 5), (64, 34)]
"""(channels, states of each)"""
CALLS = [conv_call(*sizes) for sizes in CONVS] + [rule_call(*sizes) for sizes in RULES]
CALLS += [scan_call(*sizes) for sizes in SCANS]


def random_inputs(call: Call) -> list[Array]:
    """Of the operator: positions, slots and empty states are the last three."""
    random = np.random.default_rng(0)
    kinds = [kind for kind in call.inputs if kind]
    arrays = [random.normal(size=kind.shape).astype(np.float32) for kind in kinds[:-3]]
    if call.op.endswith("Rule"):
        arrays[1:] = [-np.abs(arrays[1]), np.abs(arrays[2])]
    elif call.op.endswith("Scan"):
        arrays[1] *= 4  # so that steps are of all sizes
        arrays[5] = -np.exp(arrays[5])
    return [*arrays, POSITIONS, SLOTS, np.zeros(kinds[-1].shape, np.float32)]


def room(call: Call, fill: float = 0.0) -> Array:
    """Memory for all slots, aligned as kernels want it."""
    n = N_SLOTS * call.attribute("slot_bytes") // 4
    raw = np.full(n + 16, fill, np.float32)
    start = -raw.ctypes.data % 64 // 4
    return raw[start : start + n]


def of_rows(call: Call, rows: int) -> Call:
    """The same call of so many rows."""

    def cut(kind: TensorType | None) -> TensorType | None:
        return (
            kind
            if kind is None or kind.constant or kind.shape[0] != M
            else TensorType((rows, *kind.shape[1:]), kind.dtype)
        )

    out = cut(call.outputs[0])
    assert out is not None
    return Call(call.op, tuple(map(cut, call.inputs)), (out, call.outputs[1]), call.attributes)


def run_rows(
    run: Run, call: Call, inputs: list[Array], rows: Any, state: Array, target: Target, **options: Any
) -> Array:
    part = [
        x[rows] if kind and not kind.constant and kind.shape[0] == M else x
        for kind, x in zip(call.inputs, inputs, strict=True)
    ]
    result: Array = run(of_rows(call, len(part[0])), *part, target=target, state=state, **options)[0]
    return result


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_kernel_is_what_its_definition_says_on_every_level(run: Run, define: Run, target: Target, call: Call) -> None:
    assert schedules.implement(call, target).rule in ("causal_conv", "gated_rule", "selective_scan")
    inputs = random_inputs(call)
    found = run(call, *inputs, target=target, n_tasks=2, state=room(call))[0]
    np.testing.assert_allclose(found, define(without_bytes(call), *inputs)[0], rtol=2e-5, atol=1e-5)


def without_bytes(call: Call) -> Call:
    settings = [(name, value) for name, value in call.attributes if name != "slot_bytes"]
    return Call(call.op, call.inputs, call.outputs, (*settings, ("place", 0)))


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5, 6, 7, 8], [2, 7], []], ids=str)
def test_rows_have_the_same_bits_however_they_are_cut(run: Run, host: Target, call: Call, cuts: list[int]) -> None:
    inputs, together, apart = random_inputs(call), room(call), room(call)
    wanted = run_rows(run, call, inputs, slice(None), together, host, n_tasks=3)
    parts = np.split(np.arange(M), cuts)
    found = np.concatenate([run_rows(run, call, inputs, rows, apart, host) for rows in parts])
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_sequence_is_alone_and_begins_anew(run: Run, host: Target, call: Call) -> None:
    """Neighbours change nothing, nor does what a slot has held before: numbers that are none."""
    inputs = random_inputs(call)
    wanted = run_rows(run, call, inputs, slice(None), room(call), host)
    own = np.array([0, 1, 2, 8])  # from the first token on
    found = run_rows(run, call, inputs, own, room(call, np.nan), host)
    np.testing.assert_array_equal(found, wanted[own])


def test_weights_of_a_checkpoint_in_bf16_are_widened(run: Run, host: Target) -> None:
    call, wide = (conv_call("llmc.StatefulCausalConvBias", 48, 4, 1, dtype) for dtype in ("bf16", "f32"))
    inputs = random_inputs(wide)
    rounded = [x.view(np.uint32) & 0xFFFF0000 for x in inputs[1:3]]
    inputs[1:3] = [x.view(np.float32) for x in rounded]
    found, wanted = (run(each, *inputs, target=host, state=room(each))[0] for each in (call, wide))
    np.testing.assert_array_equal(found, wanted)


def test_a_scans_steps_gates_and_rates_may_be_of_any_size(run: Run, define: Run, target: Target) -> None:
    """Steps of nothing and of a hundred, states that are gone after a token or that stay, gates that are shut."""
    call = scan_call(80, 8)
    inputs = random_inputs(call)
    inputs[1] = np.linspace(-120, 120, M * 80, dtype=np.float32).reshape(80, M).T.copy()
    inputs[2] = np.linspace(-200, 200, M * 80, dtype=np.float32).reshape(M, 80)
    inputs[5] = -np.logspace(-6, 3, 80 * 8, dtype=np.float32).reshape(80, 8)
    found = run(call, *inputs, target=target, state=room(call))[0]
    wanted = define(without_bytes(call), *inputs)[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5 * np.abs(wanted).max())
    assert np.isfinite(found).all()

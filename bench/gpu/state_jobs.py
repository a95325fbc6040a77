"""Layers with a state as they are carried to a GPU machine: odd shapes, and those of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmc.compiler.kernel import Call, TensorType
from llmc.schedules.states_call import CONVS, DELTA_RULES, SELECTIVE_SCAN

if TYPE_CHECKING:
    from llmc.bench.gpu.jobs import Jobs

ODD_CONVS = ((1, 8192, 4, 1), (5, 130, 3, 0), (8, 2048, 3, 0), (70, 300, 4, 1), (300, 8192, 4, 1))
"""Rows, channels, taps, silu."""
ODD_RULES = (
    (1, 16, 32, 128, 128),
    (3, 1, 3, 7, 5),
    (8, 16, 32, 128, 128),
    (64, 2, 4, 24, 48),
    (90, 2, 4, 96, 192),
    (300, 16, 32, 128, 128),
)
"""Rows, heads of keys, of values, and their sizes."""
ODD_SCANS = ((1, 8192, 16), (3, 7, 5), (9, 300, 34), (64, 1536, 16), (300, 1536, 16), (90, 130, 8))
"""Rows, channels, states of each."""
SLOTS = 9
"""Those that a step's rows may name (inputs.py: `step_rows`)."""


def add_odd_states(jobs: Jobs, *, few: bool = False) -> None:
    """Shapes to be checked; few: one of each, for a try."""
    for m, channels, taps, silu in ODD_CONVS[1::9] if few else ODD_CONVS:
        for op, has_bias in CONVS.items():
            name = f"odd convolution{' with bias' * has_bias} M={m} C={channels} L={taps}"
            jobs.add(name, conv_call(op, m, channels, taps, silu), 1, tuned=False)
    for m, *sizes in ODD_RULES[1::9] if few else ODD_RULES:
        key_heads, value_heads, key_dim, value_dim = sizes
        name = f"odd delta rule M={m} KH={key_heads} VH={value_heads} D={key_dim}x{value_dim}"
        for op, own_gates in DELTA_RULES.items():
            call = rule_call(op, m, key_heads, value_heads, key_dim, value_dim)
            jobs.add(f"{name}{' with its gates' * own_gates}", call, 1, tuned=False)
    for m, channels, size in ODD_SCANS[1::9] if few else ODD_SCANS:
        jobs.add(f"odd selective scan M={m} C={channels} N={size}", scan_call(m, channels, size), 1, tuned=False)


def slot_bytes(state: TensorType) -> int:
    """Bytes of a slot that has only this state."""
    return -(-state.n_bytes // state.shape[0] // 64) * 64


def conv_call(op: str, m: int, channels: int, taps: int, silu: int) -> Call:
    x, rows, state = (
        TensorType((m, channels), "f32"),
        TensorType((m,), "i32"),
        TensorType((SLOTS, taps - 1, channels), "f32"),
    )
    vectors = [TensorType((channels, taps), "f32", constant=True)]
    vectors += [TensorType((channels,), "f32", constant=True)] * CONVS[op]
    settings = (("silu", silu), ("slot_bytes", slot_bytes(state)))
    return Call(op, (x, *vectors, rows, rows, state), (x, state), settings)


def scan_call(m: int, channels: int, size: int) -> Call:
    x, states, rows = TensorType((m, channels), "f32"), TensorType((m, size), "f32"), TensorType((m,), "i32")
    rate, vector = (TensorType(shape, "f32", constant=True) for shape in ((channels, size), (channels,)))
    state = TensorType((SLOTS, channels, size), "f32")
    operands = (x, x, x, states, states, rate, vector, vector, rows, rows, state)
    return Call(SELECTIVE_SCAN, operands, (x, state), (("slot_bytes", slot_bytes(state)),))


def rule_call(op: str, m: int, key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> Call:
    qkv = TensorType((m, 2 * key_heads * key_dim + value_heads * value_dim), "f32")
    gates, rows = TensorType((m, value_heads), "f32"), TensorType((m,), "i32")
    state = TensorType((SLOTS, value_heads, key_dim, value_dim), "f32")
    sizes = {"num_k_heads": key_heads, "num_v_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim}
    settings = sizes | {"scale": key_dim**-0.5, "epsilon": 1e-6, "slot_bytes": slot_bytes(state)}
    out = TensorType((m, value_heads * value_dim), "f32")
    vectors = (TensorType((value_heads,), "f32", constant=True),) * (2 * DELTA_RULES[op])
    inputs = (qkv, gates, gates, *vectors, rows, rows, state)
    return Call(op, inputs, (out, state), tuple(sorted(settings.items())))

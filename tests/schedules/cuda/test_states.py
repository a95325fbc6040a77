"""Layers with a state on the emulator: against their definitions, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call
from llmc.compiler.target import Target
from llmc.schedules.cuda.states import rule as states
from llmc.schedules.cuda.states import scan_rule as scan
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.test_states import (
    M,
    conv_call,
    of_rows,
    random_inputs,
    room,
    rule_call,
    run_rows,
    scan_call,
    without_bytes,
)

Array = np.ndarray[Any, Any]
HOPPER = Target("cuda", "sm_90a")
CALLS = [
    conv_call("llmc.StatefulCausalConv", 130, 4, 1),
    conv_call("llmc.StatefulCausalConvBias", 7, 2, 0, "bf16"),
    rule_call(2, 4, 24, 48),
    rule_call(1, 3, 7, 5),
    rule_call(1, 1, 128, 10),
    rule_call(1, 2, 160, 8),
    rule_call(2, 4, 16, 12, "Selective"),
    rule_call(2, 4, 16, 12, own_gates=True),
    scan_call(70, 16),
    scan_call(7, 5, "bf16"),
    scan_call(40, 34),
]


def run(call: Call, *inputs: Array | None, target: Target, state: Array) -> list[Array]:
    implementation = schedules.implement(call, target)
    assert implementation.rule in ("causal_conv", "delta_rule", "selective_scan")
    return EmulatedExecutable(call, implementation, target).run(*inputs[:-1], None, state=state)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_kernel_is_what_its_definition_says(define: Callable[..., list[Array]], call: Call) -> None:
    """What a slot has held before matters to those alone who go on from it: numbers that are none would show."""
    inputs, state = random_inputs(call), room(call, np.nan)
    own = state.reshape(3, -1)
    own[1:] = 0
    found = run(call, *inputs, target=HOPPER, state=state)[0]
    np.testing.assert_allclose(found, define(without_bytes(call), *inputs)[0], rtol=2e-5, atol=2e-6)
    n = call.outputs[1].n_bytes // 4 // 3
    assert np.isfinite(own[:, :n]).all()
    assert np.isnan(own[0, n:]).all()


@pytest.mark.parametrize("call", [CALLS[0], CALLS[2], CALLS[-3]], ids=str)
def test_a_text_may_begin_where_another_ends(define: Callable[..., list[Array]], call: Call) -> None:
    """In the same slot, in one step."""
    inputs = random_inputs(call)
    inputs[-3] = np.array([0, 1, 0, -1, 5, 6, 4, 0, 1])
    found = run(call, *inputs, target=HOPPER, state=room(call))[0]
    np.testing.assert_allclose(found, define(without_bytes(call), *inputs)[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("call", [CALLS[0], CALLS[2], CALLS[7], CALLS[-3]], ids=str)
@pytest.mark.parametrize("cuts", [[2, 7], [1, 2, 3, 4, 5, 6, 7, 8]], ids=str)
def test_rows_have_the_same_bits_however_they_are_cut(call: Call, cuts: list[int]) -> None:
    inputs, together, apart = random_inputs(call), room(call), room(call)
    wanted = run_rows(run, call, inputs, slice(None), together, HOPPER)
    parts = np.split(np.arange(M), cuts)
    found = np.concatenate([run_rows(run, call, inputs, rows, apart, HOPPER) for rows in parts])
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(apart, together)


PROMPT = [(2, 0, 45), (0, 7, 1), (-1, -1, 2), (1, 0, 50), (2, 45, 3), (-1, -1, 4)]
"""(slot, position, rows): of one sequence after another, of nobody, and more of the first."""


@pytest.mark.parametrize("call", [CALLS[0], rule_call(1, 2, 24, 80), rule_call(1, 1, 7, 3), scan_call(40, 8)], ids=str)
def test_a_prompts_rows_are_what_few_rows_are(define: Callable[..., list[Array]], call: Call) -> None:
    """The kernels of many rows, which divide them otherwise, give the same bits."""
    slots = np.concatenate([np.full(n, slot) for slot, _, n in PROMPT])
    positions = np.concatenate([np.arange(at, at + n) if at >= 0 else np.full(n, -1) for _, at, n in PROMPT])
    rows, random = len(slots), np.random.default_rng(1)
    inputs = random_inputs(call)
    for index, kind in enumerate(call.inputs):
        if kind and not kind.constant and kind.dtype == "f32" and kind.shape[0] == M:
            inputs[index] = np.tile(inputs[index], (rows // M + 1, 1))[:rows]
            inputs[index] *= np.float32(random.uniform(0.5, 1.5, inputs[index].shape))
    inputs[-3:-1] = positions, slots
    many, together, apart = of_rows(call, rows), room(call), room(call)
    found = run(many, *inputs, target=HOPPER, state=together)[0]
    np.testing.assert_allclose(found, define(without_bytes(many), *inputs)[0], rtol=2e-5, atol=5e-6)
    is_of_rows = [kind and not kind.constant and kind.shape[0] == rows for kind in many.inputs]
    for start in range(0, rows, 60):
        part = slice(start, start + 60)
        few = of_rows(call, len(slots[part]))
        cut = [x[part] if of else x for of, x in zip(is_of_rows, inputs, strict=True)]
        np.testing.assert_array_equal(run(few, *cut, target=HOPPER, state=apart)[0], found[part])
    np.testing.assert_array_equal(apart, together)


def test_what_no_kernel_takes_is_left_to_others() -> None:
    assert states.match_conv(conv_call("llmc.StatefulCausalConv", 8, 17, 0), HOPPER) is None
    assert states.match_rule(rule_call(1, 1, 513, 4), HOPPER) is None
    assert scan.match(scan_call(8, 33), HOPPER) is None

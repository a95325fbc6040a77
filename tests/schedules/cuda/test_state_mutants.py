"""Every wait and turn of layers with a state is needed: when one is changed, it is noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Implementation
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.test_mutants import HOPPER, Case, is_noticed
from tests.schedules.test_states import SLOTS, conv_call, random_inputs, room, rule_call, scan_call

Array = np.ndarray[Any, Any]
POSITIONS = np.array([0, 1, 0, -1, 5, 6, 4, 7, 3])
"""A text begins anew behind its first tokens, and one of another step goes on with a single row."""
CALLS = {"rule": rule_call(1, 2, 7, 6), "conv": conv_call("llmc.StatefulCausalConv", 5, 3, 0)}
CALLS["scan"] = scan_call(5, 8)


def case_of(kind: str) -> Case:
    """Results, and what is left in the slots."""
    call = CALLS[kind]

    def run(implementation: Implementation) -> list[Array]:
        state = room(call, 0.5)
        inputs = [*random_inputs(call)[:-3], POSITIONS, SLOTS, None]
        y = EmulatedExecutable(call, implementation, HOPPER).run(*inputs, state=state)[0]
        return [y, state]

    return Case(schedules.implement(call, HOPPER), HOPPER, run, ())


CHANGES = [
    ("rule", "delta_rule.cuh", "__syncthreads();  // the chunk is there, and all have left the one before", ";"),
    ("rule", "delta_rule.cuh", "cp_async_wait<0>();", ";"),
    ("rule", "delta_rule.cuh", "        wait_for_previous();", ";"),
    ("rule", "delta_rule.cuh", "if (own_gates.w != 0.f) clear(t);", ";"),
    ("rule", "delta_rule.cuh", "if (rows.before(first, slot) < 0) run", "run"),
    ("rule", "delta_rule.cuh", "__shfl_xor_sync(kAllOfWarp, news, 16)", "news"),
    ("conv", "causal_conv.cuh", "if (rows.positions[row] == 0) clear(window);", ";"),
    ("conv", "causal_conv.cuh", "if (row < C::kRows) look_back", "look_back"),
    ("conv", "causal_conv.cuh", "wait_for_previous();", ";"),
    ("scan", "selective_scan.cuh", "wait_for_previous();", ";"),
    ("scan", "selective_scan.cuh", "if (rows.positions[row] == 0) clear(t);", ";"),
    ("scan", "selective_scan.cuh", "if (rows.before(first, slot) < 0) run", "run"),
    ("scan", "selective_scan.cuh", "if (row + i < end) take", "take"),
    ("scan", "selective_scan.cuh", "bit > 0; bit /= 2) sum", "bit > 1; bit /= 2) sum"),
]


@pytest.mark.parametrize(("kind", "header", "old", "new"), CHANGES)
def test_nothing_can_be_another_or_be_missing(kind: str, header: str, old: str, new: str) -> None:
    assert is_noticed(case_of(kind), header, old, new)

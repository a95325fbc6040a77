"""What a kit knows of attention over whole texts: its rows, what PyTorch says of them, and that nobody tunes it."""

from __future__ import annotations

import numpy as np
import pytest

from llmc import schedules
from llmc.bench.gpu import inputs, jobs, reference
from llmc.compiler.target import Target
from llmc.schedules import records
from tests.emulator.emulate import EmulatedExecutable

HOPPER = Target("cuda", "sm_90a")


def test_texts_are_in_a_step_whole() -> None:
    rows = inputs.text_rows(30, 500)
    assert rows[:18] == [(0, position) for position in range(18)]
    assert rows[18:20] == [(1, 0), (2, 0)]
    assert rows[-2:] == [(2, 9), None]


@pytest.mark.parametrize("window", [0, 40])
def test_what_is_checked_against_is_what_kernels_make(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_REFERENCE", "cpu")
    call = jobs.attention_call(100, 2, 1, 32, 32, "bf16", both_ways=True, window=window)
    made = inputs.make(call, 500)
    wanted = reference.expected(call, made)
    implementation = schedules.implement(call, HOPPER)
    assert made.keys is not None
    kv = np.full(2 * len(made.keys) * implementation.kv_layer_bytes, 0xFF, np.uint8)
    kinds = enumerate(kind for kind in call.inputs if kind is not None)
    arrays = [made.array(i) if i in made.arrays else np.zeros(kind.shape, np.float32) for i, kind in kinds]
    found, *_ = EmulatedExecutable(call, implementation, HOPPER).run(*arrays, kv=kv)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-3 * np.abs(wanted).max())
    assert records.signature(call, HOPPER) is None

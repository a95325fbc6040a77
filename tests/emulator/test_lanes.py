"""What one lane of a warp may say and wait for in the others' place on the emulator: what a __syncwarp lies between."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.runtime.errors import LlmcError
from tests.emulator.test_emulator import launch, mutant, normal

# One warp reads what the other overwrites; its first lane says when.
ELECTED = """
extern "C" __global__ void k(const float *x, float *y) {
    float *s = reinterpret_cast<float *>(dynamic_shared());
    uint64_t *empty = reinterpret_cast<uint64_t *>(s + 32);
    const int i = threadIdx.x, lane = lane_index();
    if (i == 0) {
        mbarrier_init(empty, 1);
        fence_mbarrier_init();
    }
    if (i < 32) s[i] = x[i];
    __syncthreads();
    if (i < 32) {
        y[i] = s[31 - i];
        __syncwarp();
        if (lane == 0) mbarrier_arrive(empty);
    } else {
        mbarrier_wait(empty, 0);
        s[lane] = x[i];
        __syncwarp();  // of the writers
        y[i] = s[31 - lane];
    }
}
"""
RACE = r"race: a store writes shared memory \+ \w+, which another warp read \(\d+\), with no barrier between"


def swapped(source: str) -> None:
    x = normal(2, 32)
    found = launch(source, x, np.zeros_like(x), n_threads=64, shared_bytes=136)[1]
    np.testing.assert_array_equal(found, x[:, ::-1])


def test_a_lane_speaks_for_those_it_has_met() -> None:
    swapped(ELECTED)


def test_a_lane_waits_for_those_it_meets_then() -> None:
    swapped(mutant(ELECTED, "mbarrier_wait(empty, 0);", "if (lane == 0) mbarrier_wait(empty, 0); __syncwarp();"))


def test_each_lane_may_speak_for_itself() -> None:
    each = mutant(ELECTED, "__syncwarp();\n        if (lane == 0) mbarrier_arrive", "mbarrier_arrive")
    swapped(mutant(each, "mbarrier_init(empty, 1)", "mbarrier_init(empty, 32)"))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("__syncwarp();\n        if", "if", RACE),
        ("__syncwarp();\n        if", "__shfl_sync(0xffffffffu, i, 0);\n        if", RACE),
        ("__syncwarp();\n        if", "__ballot_sync(0xffffffffu, i);\n        if", RACE),
        ("__syncwarp();\n        if", "if (lane < 16) __syncwarp(0xffff);\n        if", RACE),
        ("mbarrier_arrive(empty);", "mbarrier_arrive(empty);\n        y[i] = s[31 - i];", RACE),
        ("mbarrier_wait(empty, 0);", "if (lane == 9) mbarrier_wait(empty, 0);", "race"),
        ("mbarrier_wait(empty, 0);", "if (lane < 31) mbarrier_wait(empty, 0); warp_index();", "race"),
        ("__syncwarp();  // of", "warp_index();  // of", "race: a load reads .*, which another lane of the warp wrote"),
        ("__syncwarp();  // of", "__any_sync(0xffffffffu, 1);  // of", "race: a load reads .*, which another lane"),
    ],
)
def test_other_meetings_of_lanes_order_no_memory(old: str, new: str, says: str) -> None:
    with pytest.raises(LlmcError, match=says):
        swapped(mutant(ELECTED, old, new))

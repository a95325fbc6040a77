"""Blocks of a cluster on the emulator: the kit's kernels for them, and what is said when they are broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.errors import LlmcError
from tests.emulator.test_emulator import launch, mutant

Array = np.ndarray[Any, Any]

MICRO = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "micro"
MULTICAST = (MICRO / "multicast.cu").read_text().replace("micro_multicast", "k")
EXCHANGE = (MICRO / "exchange.cu").read_text().replace("micro_exchange", "k")
BYTES = 3 * 1536 + 6 * 8


def sums(source: str, *, grid: int = 4, checked: bool = True) -> tuple[Array, Array]:
    """What the kernel, or a mutant, computes, and what it should."""
    generator = np.random.default_rng(0)
    w = generator.standard_normal((grid, 37, 128)).astype(np.float32)
    x = generator.standard_normal((37, 256)).astype(np.float32)
    y = np.full((grid, 128), np.nan, np.float32)
    found = launch(source, w, x, y, grid=grid, n_threads=256, shared_bytes=BYTES, checked=checked)[2]
    return found, (w * (x[:, :128] - x[:, 128:])).sum(1)


@pytest.mark.parametrize("checked", [False, True])
def test_blocks_of_a_cluster_share_what_each_of_them_brings(checked: bool) -> None:
    found, expected = sums(MULTICAST, checked=checked)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "for (int block = 0; block < kBlocks; block++)",
            "for (int block = cluster_rank(); block <= cluster_rank(); block++)",
            "deadlock: .* of 512 threads .* mbarrier_wait",
        ),
        (
            "mbarrier_arrive_in(empty + stage, block)",
            "mbarrier_arrive_in(empty + stage, cluster_rank())",
            "race: bulk_copy_multicast writes shared memory .* this thread has not waited for",
        ),
        ("mbarrier_arrive_in(empty + stage, b", "mbarrier_arrive_in(full + stage, b", "one arrival too|deadl"),
        ("mbarrier_wait(empty + stage, parity ^ 1);", "", "race|under way|one arrival too many"),
        ("full + stage, 3)", "full + stage, 1)", "deadlock: .* of 512 threads .* mbarrier_wait"),
        ("full + stage, 3)", "full + stage, 7)", "block 2 of a cluster of 2"),
        ("kHalf + kHalf * rank, x", "kHalf + kHalf * (1 - rank), x", "differ"),
        ("128 * rank, kHalf", "0, kHalf", "differ"),
        ("kHalf + kHalf * rank, x", "kHalf, x", "under way"),
        ("row < kRows + kStages", "row < kRows", "the block may end before another of its cluster|has ended"),
        ("row < kRows + kStages", "row < kRows + kStages - 1", "the block may end before another of its cl|has ended"),
        (
            "    cluster_arrive();\n    cluster_wait();  // the other block's barriers are ready too",
            "    __syncthreads();",
            "with no barrier since thread 0 initialised it",
        ),
    ],
)
def test_faults_between_the_blocks_of_a_cluster_are_caught(old: str, new: str, says: str) -> None:
    def add_up(source: str) -> None:
        found, expected = sums(source)
        assert np.allclose(found, expected, atol=1e-4), "differ"

    with pytest.raises((LlmcError, AssertionError), match=says):
        add_up(mutant(MULTICAST, old, new))


def exchanged(source: str, *, checked: bool = True) -> None:
    x = np.random.default_rng(0).standard_normal((4, 37, 128)).astype(np.float32)
    found = launch(source, x, np.zeros((4, 128), np.float32), grid=4, shared_bytes=1040, checked=checked)[1]
    assert np.allclose(found, x.sum(1)[[1, 0, 3, 2]], atol=1e-4), "differ"


@pytest.mark.parametrize("checked", [False, True])
def test_what_is_stored_in_another_block_is_there_when_its_barrier_has_counted_it(checked: bool) -> None:
    exchanged(EXCHANGE, checked=checked)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mbarrier_wait(full, row / 2 % 2);", ";", "under way|race"),
        ("mbarrier_arrive_expect(full, kRowBytes)", "mbarrier_arrive(full)", "under way|race|one arrival too many"),
        ("(full, kRowBytes)", "(full, kRowBytes + 16)", "deadlock"),
        ("four, full, other)", "four, full, other ^ 1)", "differ|race|under way|deadlock"),
        ("four, full, other)", "four, full, 2)", "store_in: block 2 of a cluster of 2"),
        ("place + 4 * lane_index(), four", "place + 1 + 4 * lane_index(), four", "not aligned to 16 bytes"),
        ("place + 4 * lane_index(), four", "place + 260 + 4 * lane_index(), four", "store_in touches shared memory"),
        ("store_in(place + 4 * lane_index(), four", "store_in(y, four", "is no pointer to shared memory"),
        ("if (lane_index() == 0) mbarrier_arrive_in(full, other);", "", "deadlock"),
        ("inbox + row % 2 * kRow", "inbox", "race: store_in writes shared memory|under way"),
        ("__syncthreads();  // all have read", ";", "race|one arrival too many"),
        ("for (int row = 0; row", "for (int row = cluster_rank(); row", "has ended|may end before|deadlock|differ"),
        (
            "    cluster_arrive();\n    cluster_wait();  // the other block's barriers are ready too",
            "    __syncthreads();",
            "with no barrier since thread 0 initialised it",
        ),
    ],
)
def test_faults_of_stores_in_another_block_are_caught(old: str, new: str, says: str) -> None:
    with pytest.raises((LlmcError, AssertionError), match=says):
        exchanged(mutant(EXCHANGE, old, new))


def test_a_grid_is_made_of_whole_clusters() -> None:
    with pytest.raises(LlmcError, match="a grid of 3 blocks; clusters have 2"):
        sums(MULTICAST, grid=3)


def test_threads_that_have_ended_do_not_hold_up_a_cluster() -> None:
    source = """
        extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float *y) {
            if (blockIdx.x == 0 && threadIdx.x >= 32) return;
            cluster_arrive();
            cluster_wait();
            if (threadIdx.x == 5) y[blockIdx.x] = cluster_rank() + 1;
        }
    """
    assert launch(source, np.zeros(2, np.float32), grid=2)[0].tolist() == [1, 2]
    with pytest.raises(LlmcError, match="cluster_wait without cluster_arrive"):
        launch(mutant(source, "cluster_arrive();"), np.zeros(2, np.float32), grid=2)
    with pytest.raises(LlmcError, match="cluster_arrive, again without cluster_wait"):
        launch(mutant(source, "cluster_wait();", "cluster_arrive();"), np.zeros(2, np.float32), grid=2)


def test_the_barrier_of_a_cluster_publishes_nothing_in_global_memory() -> None:
    source = """
        extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float *y) {
            if (threadIdx.x == 0) y[blockIdx.x] = 7;
            cluster_arrive();
            cluster_wait();
            if (threadIdx.x == 1) y[2 + blockIdx.x] = y[1 - blockIdx.x];
        }
    """
    with pytest.raises(LlmcError, match=r"race: reads operand 0 .*, which block ., thread 0 wrote, with no counter"):
        launch(source, np.zeros(4, np.float32), grid=2)


def test_a_shared_variable_in_a_cluster_is_refused() -> None:
    source = """
        extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float *y) {
            __shared__ float s[128];
            s[threadIdx.x] = 1;
            __syncthreads();
            if (threadIdx.x == 0) y[blockIdx.x] = s[1];
        }
    """
    with pytest.raises(LlmcError, match="a __shared__ variable in a cluster"):
        launch(source, np.zeros(2, np.float32), grid=2)

"""The emulator computes what a GPU would, and catches what a GPU would suffer in silence."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, TensorType
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from tests.emulator.build import build_library
from tests.emulator.emulate import (
    BACKWARD,
    FORWARD,
    EmulatedExecutable,
    Memory,
    load_library,
    run_kernel,
    set_buffers,
    tile,
    untile,
)
from tests.emulator.kernels import (
    COPIES,
    COUNTER,
    FRAGMENTS,
    NAMED,
    PIPELINE,
    PRODUCT,
    REGISTERS_A,
    REVERSE,
    SPIN,
    WARP,
)

Array = np.ndarray[Any, Any]
TARGET = Target("cuda", "sm_90a")
RNG = np.random.default_rng(0)


def launch(
    source: str, *arrays: Array, grid: int = 1, n_threads: int = 128, shared_bytes: int = 0, checked: bool = True
) -> list[Array]:
    """The arrays after kernel `k` has run on them; in both orders, which must agree."""
    kernel = Kernel("k", source, lambda: '#include "device.cuh"\n' + source, n_threads, shared_bytes)
    library = load_library(build_library([kernel], TARGET, checked=checked))
    results = []
    for order in (FORWARD, BACKWARD):
        memory = Memory({f"operand {i}": array.reshape(-1).view(np.uint8) for i, array in enumerate(arrays)})
        set_buffers(library, memory)
        library.emulated_set_order(order)
        run_kernel(library, "k", grid, memory.values())
        results.append([memory[f"operand {i}"].view(a.dtype).reshape(a.shape) for i, a in enumerate(arrays)])
    for there, back in zip(*results, strict=True):
        assert there.tobytes() == back.tobytes(), "the result depends on the order of threads"
    return results[0]


def mutant(source: str, old: str, new: str = "") -> str:
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times"
    return source.replace(old, new)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def rounded(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


# ---- threads, barriers, shuffles


def test_threads_see_each_others_shared_memory_after_a_barrier() -> None:
    x = normal(3, 128)
    assert (launch(REVERSE, x, np.zeros_like(x), grid=3, shared_bytes=512)[1] == x[:, ::-1]).all()


@pytest.mark.parametrize("checked", [False, True])
def test_shuffles_and_votes_are_those_of_a_warp(checked: bool) -> None:
    x = normal(128)
    y = launch(WARP, x, np.zeros((3, 128), np.float32), checked=checked)[1]
    warps = x.reshape(4, 32)
    np.testing.assert_allclose(y[0].reshape(4, 32), np.repeat(warps.sum(1, keepdims=True), 32, 1), atol=1e-5)
    assert (y[1].reshape(4, 32) == warps.max(1, keepdims=True)).all()
    assert (y[2].reshape(4, 32) == (warps > 0).sum(1, keepdims=True)).all()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("__syncthreads();", "", "race: a"),
        ("s[127 - i]", "s[128 - i]", r"block 0, thread 0: a load of 4 bytes at shared memory \+ 0x200 \(of 0x200\)"),
        ("i] = s[", "i + 1] = s[", "a store of 4 bytes at 0 bytes past the end of operand 1"),
        ("s[i] =", "if (i != 5) s[i] =", "differ"),
        ("x[128 * blockIdx.x + i]", "x[i - 1]", "a load of 4 bytes at 4 bytes before operand 0"),
        ("s[i] =", "*(float *)(dynamic_shared() + 4 * i + 2) =", "misaligned"),
        ("s[i] =", "if (i < 64) __syncthreads(); s[i] =", "deadlock: 64 of 128 threads .* __syncthreads|race"),
    ],
)
def test_faults_with_shared_memory_are_caught(old: str, new: str, says: str) -> None:
    def reverse(source: str) -> None:
        x = normal(1, 128)
        y = launch(source, x, np.full_like(x, np.nan), shared_bytes=512)[1]
        assert (y == x[:, ::-1]).all(), "differ"

    with pytest.raises((LlmcError, AssertionError), match=says):
        reverse(mutant(REVERSE, old, new))


def test_stores_past_the_end_are_caught_without_instrumentation() -> None:
    x = normal(1, 128)
    with pytest.raises(LlmcError, match="touched 0 bytes past the end of operand 1"):
        launch(mutant(REVERSE, "i] = s[", "i + 1] = s["), x, x, shared_bytes=512, checked=False)


def test_a_shuffle_that_lanes_miss_is_a_deadlock() -> None:
    divergent = mutant(WARP, "float sum = warp_sum(v);", "float sum = v; if (threadIdx.x & 1) sum = warp_sum(v);")
    with pytest.raises(LlmcError, match=r"in __shfl_xor_sync|while other lanes of the warp are in"):
        launch(divergent, normal(128), np.zeros((3, 128), np.float32))


def test_a_warp_s_index_is_asked_for_by_all_its_lanes() -> None:
    divergent = mutant(WARP, "float sum = warp_sum(v);", "float sum = v; if (threadIdx.x & 1) sum = warp_index();")
    with pytest.raises(LlmcError, match=r"in warp_index|while other lanes of the warp are in"):
        launch(divergent, normal(128), np.zeros((3, 128), np.float32))


def test_warps_meet_at_named_barriers() -> None:
    x = normal(128)
    y = launch(NAMED, x, np.zeros_like(x), shared_bytes=256)[1]
    assert (y == np.concatenate([x[64:], x[64:]])).all()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("named_barrier(1, 128);", "", "race"),
        ("named_barrier(1, 128);", "named_barrier(2, 128);", "deadlock: .* named_barrier"),
        ("named_barrier(1, 128);", "named_barrier(1, 96);", "where others said"),
    ],
)
def test_faults_with_named_barriers_are_caught(old: str, new: str, says: str) -> None:
    with pytest.raises(LlmcError, match=says):
        launch(mutant(NAMED, old, new), normal(128), normal(128), shared_bytes=256)


# ---- blocks


def test_the_last_block_adds_up_what_all_have_left() -> None:
    x = normal(5, 128)
    _, partial, counter, y = launch(COUNTER, x, normal(5), np.zeros(1, np.uint32), normal(1), grid=5)
    np.testing.assert_allclose(partial, x.sum(1), atol=1e-4)
    np.testing.assert_allclose(y, x.sum(), atol=1e-4)
    assert counter[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("__syncthreads();  // partial", "// partial", "race: reads operand 1 .*, which block ., thread 37 wrote"),
        ("__syncthreads();  // last", "// last", "race"),
        ("count_up(counter) ==", "atomicAdd(counter, 1) ==", "which block ., thread 37 wrote, with no counter between"),
        ("partial[blockIdx.x] =", "partial[0] =", "race: writes operand 1 .*, which block . wrote too"),
    ],
)
def test_faults_between_blocks_are_caught(old: str, new: str, says: str) -> None:
    with pytest.raises(LlmcError, match=says):
        launch(mutant(COUNTER, old, new), normal(5, 128), normal(5), np.zeros(1, np.uint32), normal(1), grid=5)


def test_waiting_for_another_block_is_a_livelock() -> None:
    with pytest.raises(LlmcError, match="livelock: looks at memory for ever in load_acquire"):
        launch(SPIN, np.zeros(1, np.uint32), grid=2, n_threads=32)


def test_results_that_depend_on_the_order_of_blocks_are_refused() -> None:
    source = '#include "device.cuh"\nextern "C" __global__ void k(int *y) { y[0] = blockIdx.x; }'
    kernel = Kernel("k", "order", lambda: source, n_threads=1)
    call = Call("Test", (), (TensorType((1,), "i32"),))
    implementation = Implementation((Launch(kernel, (Operand("output"),), grid=2),))
    with pytest.raises(LlmcError, match="output 0 depends on the order in which threads run"):
        EmulatedExecutable(call, implementation, TARGET, checked=False).run()


def test_a_dependent_launch_waits_for_the_previous_before_it_touches_what_that_wrote() -> None:
    def run(first: str, second: str) -> Array:
        source = (
            '#include "device.cuh"\nextern "C" __global__ void k(const float *w, const float *x, float *y) {\n'
            f"const int i = threadIdx.x; {first} const float v = w[i]; {second} y[i] = v + x[i]; }}"
        )
        kernel = Kernel("k", source, lambda: source, n_threads=32, dependent=True)
        call = Call(
            "Test", (TensorType((32,), "f32", constant=True), TensorType((32,), "f32")), (TensorType((32,), "f32"),)
        )
        operands = (Operand("input", 0), Operand("input", 1), Operand("output"))
        executable = EmulatedExecutable(call, Implementation((Launch(kernel, operands),)), TARGET)
        return executable.run(np.ones(32, np.float32), np.ones(32, np.float32))[0]

    assert (run("", "wait_for_previous();") == 2).all()
    with pytest.raises(LlmcError, match=r"reads input 1 \+ 0 before wait_for_previous"):
        run("", "")


# ---- asynchronous copies


def test_small_copies_arrive_when_they_are_waited_for() -> None:
    x = normal(2, 128, 4)
    y = launch(COPIES, x, normal(128, 4), shared_bytes=4096)[1]
    expected = x[0] + x[1][::-1]
    assert (y == expected).all()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("cp_async_wait<0>();", "", "into which a copy is under way"),
        ("cp_async_wait<0>();", "cp_async_wait<1>();", "into which a copy is under way"),
        ("cp_async_commit();  // second", "", "into which a copy is under way"),
        ("__syncthreads();", "", "race"),
        ("s + 2048 + 16 * i, x", "s + 2048 + 8 * i, x", "not aligned to 16 bytes"),
        ("s + 2048 + 16 * i, x", "s + 2064 + 16 * i, x", "the launch has 0x1000 bytes"),
        ("x + 512 + 4 * i", "x + 516 + 4 * i", "cp_async_16 of 16 bytes at 0 bytes past the end of operand 0"),
    ],
)
def test_faults_with_small_copies_are_caught(old: str, new: str, says: str) -> None:
    with pytest.raises(LlmcError, match=says):
        launch(mutant(COPIES, old, new), normal(2, 128, 4), normal(128, 4), shared_bytes=4096)


PIPELINE_BYTES = 2 * 512 + 4 * 8


@pytest.mark.parametrize("checked", [False, True])
def test_a_ring_of_bulk_copies_brings_every_tile(checked: bool) -> None:
    x = normal(7, 128)
    y = launch(PIPELINE, x, normal(128), n_threads=160, shared_bytes=PIPELINE_BYTES, checked=checked)[1]
    np.testing.assert_allclose(y, x.sum(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mbarrier_wait(full + stage, parity);", "", "under way|race|deadlock"),
        ("mbarrier_wait(empty + stage, parity ^ 1);", "", "race|under way|one arrival too many"),
        ("mbarrier_wait(empty + stage, parity ^ 1);", "mbarrier_wait(empty + stage, parity);", "deadlock"),
        ("mbarrier_wait(full + stage, parity);", "mbarrier_wait(full + stage, parity ^ 1);", "under way|race|deadlock"),
        (
            "mbarrier_arrive(empty + stage);",
            "",
            r"deadlock: 129 .* in mbarrier_wait on the mbarrier at shared memory \+ 0x400 \(phase 1 lacks 1",
        ),
        ("mbarrier_arrive_expect(full + stage, 512)", "mbarrier_arrive_expect(full + stage, 528)", "lacks .* 16 bytes"),
        ("mbarrier_arrive_expect(full + stage, 512)", "mbarrier_arrive(full + stage)", "under way|race"),
        ("mbarrier_init(empty + i, 128);", "mbarrier_init(empty + i, 127);", "one arrival too many|race|under way"),
        ("mbarrier_init(full + i, 1);", "", "is no initialised mbarrier"),
        ("x + 128 * t, 512", "x + 128 * t + 1, 512", "not aligned to 16 bytes"),
        ("x + 128 * t, 512", "x + 128 * t, 504", "504 bytes: not a multiple of 16"),
        ("x + 128 * t, 512", "x + 128 * (t + 1), 512", "bulk_copy of 512 bytes at 0 bytes past the end of operand 0"),
        ("s + 512 * stage, x", "s + 512 * stage + 64, x", "touches shared memory"),
        ("__syncthreads();", "", "is no initialised mbarrier|with no barrier since thread 0 initialised it"),
        ("t < 7; t++) {  // consumer", "t < 6; t++) {  // consumer", "a bulk copy under way|differ"),
    ],
)
def test_faults_with_bulk_copies_are_caught(old: str, new: str, says: str) -> None:
    def add_up(source: str) -> None:
        x = normal(7, 128)
        y = launch(source, x, normal(128), n_threads=160, shared_bytes=PIPELINE_BYTES)[1]
        assert np.allclose(y, x.sum(0), rtol=1e-5), "differ"

    with pytest.raises((LlmcError, AssertionError), match=says):
        add_up(mutant(PIPELINE, old, new))


# ---- tensor cores


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_warp_multiplies_fragments(dtype: str) -> None:
    kind = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[dtype]
    a, b = normal(16, 16).astype(kind), normal(8, 16).astype(kind)
    outs = launch(FRAGMENTS.replace("T_", dtype), a, b, normal(16, 8), normal(16, 8), n_threads=32, shared_bytes=1024)
    expected = a.astype(np.float32) @ b.astype(np.float32).T
    np.testing.assert_allclose(outs[2], expected, atol=1e-4)
    np.testing.assert_allclose(outs[3], expected, atol=1e-4)


def test_swapped_fragments_give_another_product() -> None:
    a, b = normal(16, 16).astype(np.float16), normal(8, 16).astype(np.float16)
    source = mutant(FRAGMENTS, "a[1] = pair(pa, g + 8, t)", "a[1] = pair(pa, g, t + 4)").replace("T_", "f16")
    outs = launch(source, a, b, normal(16, 8), normal(16, 8), n_threads=32, shared_bytes=1024)
    assert np.abs(outs[2] - outs[3]).max() > 0.1


def tiles_of(matrix: Array) -> Array:
    return tile(matrix, "bf16")


PRODUCT_BYTES = 64 * 128 * 2 + 64


def product_of(source: str, *, checked: bool = True) -> tuple[Array, Array]:
    """What a mutant of PRODUCT computes, and what it should."""
    a, b = normal(64, 128), normal(64, 128)
    y = launch(source, tiles_of(a), tiles_of(b), normal(64, 64), shared_bytes=2 * PRODUCT_BYTES, checked=checked)[2]
    return y, rounded(a) @ rounded(b).T


@pytest.mark.parametrize("checked", [False, True])
def test_a_warpgroup_multiplies_tiles(checked: bool) -> None:
    y, expected = product_of(PRODUCT, checked=checked)
    np.testing.assert_allclose(y, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("wgmma_wait<0>(d);", "", "differ|under way"),
        ("wgmma_wait<0>(d);", "wgmma_wait<1>(d);", "differ|under way"),
        ("wgmma_commit();", "", "differ|under way"),
        ("wgmma_fence(d);", "", "without a wgmma_fence"),
        ("k_major_descriptor(b, k)", "k_major_descriptor(b, k ^ 1)", "differ"),
        ("slab > 0 || k > 0", "true", "the result depends|differ"),
        ("wgmma_wait<0>(d);", "s[0] = 0; wgmma_wait<0>(d);", "changed between|race"),
        ("wgmma_wait<0>(d);", "d[3] = 0; wgmma_wait<0>(d);", "registers were written before"),
        ("mbarrier_wait(full, 0);", "", "under way"),
        ("b = s + 16384", "b = s + 16448", "which was overwritten"),
        ("64, bf16>", "64, f16>", "differ"),
    ],
)
def test_faults_with_wgmma_are_caught(old: str, new: str, says: str) -> None:
    def multiply(source: str) -> None:
        y, expected = product_of(source)
        assert np.allclose(y, expected, atol=1e-3), "differ"

    with pytest.raises((LlmcError, AssertionError), match=says):
        multiply(mutant(PRODUCT, old, new))


def registers_product(source: str) -> tuple[Array, Array]:
    a, v = normal(64, 64), normal(64, 64)
    y = launch(source, a, v.astype(ml_dtypes.bfloat16), normal(64, 64), shared_bytes=8192)[2]
    return y, rounded(a) @ rounded(v)


def test_a_may_come_from_registers_and_b_lie_transposed() -> None:
    y, expected = registers_product(REGISTERS_A)
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_a_missing_proxy_fence_is_caught() -> None:
    with pytest.raises(LlmcError, match=r"thread \d+ wrote without a fence_async_shared"):
        registers_product(mutant(REGISTERS_A, "fence_async_shared();"))


def test_a_register_that_a_product_still_reads_may_not_change() -> None:
    wait = "wgmma_wait<0>(d);"
    with pytest.raises(LlmcError, match="registers that a wgmma reads changed"):
        registers_product(mutant(REGISTERS_A, wait, f"fragments[3][2] = 0; {wait}"))


def test_registers_that_were_written_need_a_fence_before_the_product() -> None:
    fenced = "wgmma_fence(d);"
    with pytest.raises(LlmcError, match="A's registers without a wgmma_fence"):
        registers_product(mutant(REGISTERS_A, fenced, f"{fenced} wgmma_commit();"))


@pytest.mark.parametrize("shape", [(1, 64), (8, 128), (13, 100)])
def test_tiling_a_matrix_and_back_gives_the_matrix(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    assert (untile(tile(x, "bf16").reshape(-1).view(np.uint8), shape, "bf16") == rounded(x)).all()

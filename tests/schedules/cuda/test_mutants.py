"""Every barrier, wait, fence and offset of the kernels that matter is needed: when one is changed, it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, Implementation
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention import rule as attention
from llmc.schedules.cuda.compile import INCLUDE
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.mutate import Mutant, without_synchronisation
from tests.schedules.cuda.test_attention import LENGTHS, Machine, Model, Row, finest
from tests.schedules.cuda.test_deferred_norm import deferred_call, quantised_inputs, stored_as
from tests.schedules.cuda.test_deferred_norm import random_inputs as handed_inputs
from tests.schedules.cuda.test_linear import linear_call, quantised, random_inputs

Array = np.ndarray[Any, Any]
HOPPER, AMPERE = Target("cuda", "sm_90a"), Target("cuda", "sm_80")


@dataclass(frozen=True)
class Case:
    """An implementation to break, and how to run what is left.

    headers: whose statements are taken away.  spare: statements that this case can do without, by a part of their
    line; each has its reason where it is named.
    """

    implementation: Implementation
    target: Target
    run: Callable[[Implementation], list[Array]]
    headers: tuple[str, ...]
    spare: tuple[str, ...] = ()


def linear_case(
    name: str,
    shape: tuple[int, int, int],
    headers: tuple[str, ...],
    *,
    target: Target = HOPPER,
    params: linear.Params | None = None,
    spare: tuple[str, ...] = (),
    weight: tuple[DType, int] | None = None,
    **options: Any,
) -> Case:
    call = linear_call(name, *shape, **options)
    inputs = random_inputs(call)
    if weight:
        call, inputs = quantised(call, *weight)
    chosen = linear.implement(call, params, target) if params else schedules.implement(call, target)

    def run(implementation: Implementation) -> list[Array]:
        return EmulatedExecutable(call, implementation, target).run(*inputs)

    return Case(chosen, target, run, headers, spare)


def attention_case(
    rows: list[Row],
    headers: tuple[str, ...],
    target: Target,
    spare: tuple[str, ...] = (),
    kv_dtype: str = "bf16",
    params: attention.Tile | attention.Stream | None = None,
) -> Case:
    model = Model(kv_dtype=kv_dtype)
    call = model.call(len(rows))
    machine = Machine(model, LENGTHS)
    inputs, pool = machine.inputs(rows), machine.pool(rows)
    cache = np.zeros_like(machine.caches[0])
    chosen = params or finest(attention.match(call, target))
    assert chosen is not None

    def run(implementation: Implementation) -> list[Array]:
        after = pool.copy()
        kv = after.reshape(-1)[pool.shape[1] // 2 :]
        out, *_ = EmulatedExecutable(call, implementation, target).run(*inputs, cache, cache, kv=kv)
        return [out, after]

    return Case(attention.implement(call, chosen, target), target, run, headers, spare)


def norm_case(
    call: Call,
    params: linear.Params,
    target: Target = HOPPER,
    weight: DType | None = None,
    headers: tuple[str, ...] = (),
    spare: tuple[str, ...] = (),
) -> Case:
    """Either product of a deferred norm.  weight: in what codes it is."""
    inputs = quantised_inputs(call, weight)[0] if weight else handed_inputs(call)
    if weight:
        call = stored_as(call, weight)

    def run(implementation: Implementation) -> list[Array]:
        return EmulatedExecutable(call, implementation, target).run(*inputs)

    return Case(linear.implement(call, params, target), target, run, headers, spare)


ROWS: list[Row] = [*((0, i) for i in range(30, 65)), None, *((1, i) for i in range(100, 131)), (2, 2), (3, 200)]

CASES: dict[str, Callable[[], Case]] = {
    "GEMV with a norm": lambda: linear_case(
        "RMSNormLinear",
        (3, 72, 2100),
        ("gemv.cuh", "gemv_ring.cuh", "gemv_x.cuh"),
        spare=(
            "__syncwarp",  # a lane reads only what it brought itself; quantised weights have scales for all
            "mbarrier",  # of bulk copies
            "named_barrier",  # of a single buffer of sums
        ),
    ),
    "GEMV of int8, two blocks to a band": lambda: norm_case(
        deferred_call("RMSNormLinear", 3, 200, 1088, columns=16),
        Gemv(5, 2, 4, 2, 1, shared_x=False, bulk=True, split=2),
        weight="i8",
        headers=("gemv.cuh", "gemv_split.cuh"),
        spare=("__syncwarp",),  # the cluster's barrier makes lanes meet here
    ),
    "GEMV of int4, in bulk and digits": lambda: norm_case(
        deferred_call("RMSNormLinear", 3, 72, 1088, columns=16),
        Gemv(5, 2, 2, 1, 1, shared_x=True, digits=True, bulk=True),
        weight="i4",
        headers=("gemv_ring.cuh", "gemv_digits.cuh"),
        spare=(
            "cp_async",  # of copies by lanes
            "__syncwarp",  # of the ring's barriers, once they are made: there is another before they are waited for
        ),
    ),
    "GEMM on Hopper, a long ring": lambda: linear_case(
        "LinearBias",
        (40, 200, 900),
        ("gemm_wgmma.cuh", "gemm_tile.cuh"),
        params=Tiling(40, 3, 1, shared=False),
        spare=(
            "wait_for_previous",  # the producer's reaches all through the ring's barriers
            "cluster",  # there is none
            "mbarrier_arrive_in",
            "shared.normed",  # no norm either: NORMS
            "__syncwarp",
            "kFreeBarrier",  # no K is shared: below
            "kThereBarrier",
        ),
        tiled_x=True,
    ),
    "GEMM on Hopper, K shared": lambda: linear_case(
        "LinearBias",
        (40, 330, 256),
        ("gemm_wgmma.cuh",),
        params=Tiling(40, 3, 1, shared=False, along=True),  # a tile is shorter than the ring
        spare=("wait_for_previous", "cluster", "mbarrier_arrive_in", "shared.normed", "__syncwarp"),  # as above
        tiled_x=True,
    ),
    "GEMV of int4, x column by column": lambda: linear_case(
        "LinearResidual",
        (11, 72, 1300),
        ("gemv_x.cuh",),
        params=Gemv(5, 2, 2, 2, 1, False),
        spare=("__syncthreads",),  # of an x that is kept in shared memory, or normalised
        weight=("i4", 32),
        tiled_x=True,
    ),
    "GEMM in clusters": lambda: linear_case(
        "LinearBias",
        (136, 200, 900),
        ("gemm_wgmma.cuh",),
        params=Tiling(144, 3, 2, shared=False, cluster=2),
        spare=(
            "wait_for_previous",  # as above
            "shared.normed",
            "__syncthreads",  # who initialises the barriers also asks for the first copies here
            "mbarrier_arrive(empty)",  # of a block alone
            "__syncwarp",  # the cluster's barrier makes lanes meet here
            "kFreeBarrier",  # no K is shared
            "kThereBarrier",
        ),
        tiled_x=True,
    ),
    "GEMM of int4 on Hopper, a long ring": lambda: linear_case(
        "LinearBias",
        (40, 200, 900),
        ("gemm_wgmma_codes.cuh",),
        params=Tiling(40, 3, 1, shared=False),
        spare=("__syncwarp",),  # of codes without groups
        weight=("i4", 32),
        tiled_x=True,
    ),
    "GEMM of int8 on Hopper, shared tiles": lambda: linear_case(
        "LinearBias", (24, 200, 900), (), params=Tiling(24, 2, 3), weight=("i8", 0), tiled_x=True
    ),
    "GEMM of int4 on Ampere": lambda: linear_case(
        "LinearBias", (40, 200, 700), ("gemm_mma.cuh",), target=AMPERE, weight=("i4", 32), tiled_x=True
    ),
    "GEMM on Ampere": lambda: linear_case(
        "LinearBias", (40, 200, 700), ("gemm_mma.cuh", "gemm_tile.cuh"), target=AMPERE, tiled_x=True
    ),
    "GEMM in f32": lambda: linear_case("Linear", (20, 70, 100), ("gemm_fma.cuh",), dtype="f32"),
    "attention of many rows on Hopper": lambda: attention_case(
        ROWS,
        ("attention_wgmma.cuh", "attention_ring.cuh"),
        HOPPER,
        spare=(
            "__syncwarp",  # bytes may land before they are expected, and no lane reads beside products
            "named_barrier",  # turns are for speed alone
            "ring.over",  # the ring holds less than an item's pages
            "mbarrier_wait(&ring.known[round % 2], round",  # the one warp that fetches has looked at the rows itself
        ),
        params=attention.Tile(2, 2, blocks=1),
    ),
    "attention of many rows on Hopper, a long ring": lambda: attention_case(
        ROWS,
        ("attention_ring.cuh",),
        HOPPER,
        spare=("fence_async_shared",),  # each stage's copies come but once after its zeros
        params=attention.Tile(11, 1, blocks=2),
    ),
    "attention of many rows on Ampere": lambda: attention_case(
        ROWS, ("attention_rows.cuh", "attention_tile.cuh"), AMPERE
    ),
    "attention of many rows in int8 on Hopper": lambda: attention_case(
        ROWS, ("attention_widen_ring.cuh",), HOPPER, kv_dtype="int8"
    ),
    "attention of many rows in int8": lambda: attention_case(ROWS, ("attention_widen.cuh",), AMPERE, kv_dtype="int8"),
}


def survives(case: Case, mutant: Mutant, right: list[Array]) -> bool:
    """Whether nothing is noticed: no report, and the same results."""
    try:
        results = case.run(mutant.of(case.implementation))
    except LlmcError as error:
        if "refused the source" in error.fact:
            raise
        return False
    return all(np.array_equal(result, other, equal_nan=True) for result, other in zip(results, right, strict=True))


OTHERS_WAIT = ("GEMM of int8 on Hopper, shared tiles",)
"""Cases whose waits are another's."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in OTHERS_WAIT])
def test_no_wait_can_be_left_out(name: str) -> None:
    assert unnoticed(CASES[name]()) == []


def unnoticed(case: Case) -> list[str]:
    """Waits that can be left out of the case's headers, but those that it spares."""
    right = case.run(case.implementation)
    mutants = [mutant for mutant in without_synchronisation(case.implementation) if mutant.header in case.headers]
    assert mutants
    survivors = [mutant for mutant in mutants if survives(case, mutant, right)]
    return [str(mutant) for mutant in survivors if not any(text in mutant.old for text in case.spare)]


OFFSETS = [
    ("GEMV with a norm", "gemv_weight.cuh", "t + 4 * (i / 2)", "t + 4 * (1 - i / 2)"),
    (
        "GEMV with a norm",
        "gemv_x.cuh",
        "place(shared, column, token, t + i % 2 * 4)",
        "place(shared, column, token, t)",
    ),
    (
        "GEMV of int4, x column by column",
        "gemv_x.cuh",
        "chunk_offset(row, lane_index() / 8",
        "chunk_offset(0, lane_index() / 8",
    ),
    ("GEMV of int4, in bulk and digits", "gemv_digits.cuh", "uint32_t(q + 128) >> 8", "uint32_t(q) >> 8"),
    ("GEMV of int4, in bulk and digits", "gemv_digits.cuh", "offset = 4; offset > 0;", "offset = 2; offset > 0;"),
    ("GEMV of int4, in bulk and digits", "gemv_ring.cuh", "parities ^= 1u << stage;", ";"),
    ("GEMV of int4, in bulk and digits", "gemv.cuh", "lane_index() % 2 * 2 : lane_index();", "0 : lane_index();"),
    ("GEMV of int4, in bulk and digits", "gemv_quant.cuh", "rows[row] << 4, 0x80808080", "rows[row] << 4, 0x80808000"),
    (
        "GEMV of int4, in bulk and digits",
        "gemv_digits.cuh",
        "weight.scale(half, i) *",
        "weight.scale(half, 0) *",
    ),
    ("GEMV of int8, two blocks to a band", "gemv_split.cuh", "fragment % 2 == rank()", "fragment % 2 != 0"),
    ("GEMV of int8, two blocks to a band", "gemv_split.cuh", "turn % 2 * kSent + fragment", "fragment"),
    ("GEMV of int8, two blocks to a band", "gemv_split.cuh", "kSent + fragment / 2", "kSent"),
    ("GEMV of int8, two blocks to a band", "gemv_split.cuh", "barrier(i), 1 + kSent", "barrier(i), 1"),
    ("GEMV of int8, two blocks to a band", "gemv_split.cuh", "turn / 2 % 2);", "0);"),
    (
        "GEMV of int8, two blocks to a band",
        "gemv_split.cuh",
        "value, barrier(turn), rank() ^ 1",
        "value, barrier(turn), 0",
    ),
    ("GEMV of int8, two blocks to a band", "gemv.cuh", "blockIdx.x / G::kSplit), 0)", "blockIdx.x), 0)"),
    ("GEMV of int8, two blocks to a band", "gemv.cuh", "split.rank() * G::kWarps + warp", "warp"),
    ("GEMV of int4, x column by column", "gemv_quant.cuh", "* 4 + strip % 4", "* 4 + strip % 2"),
    ("GEMM on Hopper, a long ring", "gemm_wgmma.cuh", "stage + 2 * k_step", "stage + 3 * k_step"),
    ("GEMM on Hopper, a long ring", "gemm_wgmma.cuh", "k_step > 0 ||", "k_step >= 0 ||"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "lane < Tiling::kCluster", "lane == Tiling::rank()"),
    (
        "GEMM in clusters",
        "gemm_wgmma.cuh",
        "mbarrier_arrive_in(empty, lane)",
        "mbarrier_arrive_in(empty, 1)",
    ),
    ("GEMM in clusters", "gemm_wgmma.cuh", "4 * Tiling::kReaders * Tiling::kCluster", "4 * Tiling::kReaders"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "(1 << Tiling::kCluster) - 1", "1 << Tiling::rank()"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "(1 << Tiling::kCluster) - 1", "2 >> Tiling::rank()"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "to + offset, from + offset", "to + offset, from + 64 * 128 - offset"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "to + offset, from + offset", "to, from"),
    ("GEMM in clusters", "gemm_wgmma.cuh", "i < Tiling::kStages; i++, at", "i < Tiling::kStages - 1; i++, at"),
    ("GEMM in clusters", "gemm_tile.cuh", "rank() * kRowGroups, (band", "0, (band"),
    ("GEMM on Hopper, K shared", "gemm_tile.cuh", "kHalves * step + (kAlong ? group : 0);", "kHalves * step;"),
    ("GEMM on Hopper, K shared", "gemm_tile.cuh", "kTile * (kHalves * step + half);", "kTile * kHalves * step;"),
    ("GEMM on Hopper, K shared", "gemm_wgmma.cuh", "group.index * Tiling::kXBytes : 0", "0 : 0"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "wgmma_wait<1>", "wgmma_wait<2>"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "(a[half], codes, half)", "(a[0], codes, half)"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "a[half][i]", "a[half][0]"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "x + 2 * k_step", "x + 2 * i"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "/ 32 * Weight::kPieceBytes", "/ 32 * 512"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "part == 1 && step > stretch.begin", "part == 1"),
    (
        "GEMM of int4 on Hopper, a long ring",
        "gemm_tile.cuh",
        "round_up(kStageGroups * kGroupBytes, 1024)",
        "kStageGroups * kGroupBytes",
    ),
    ("GEMM of int4 on Hopper, a long ring", "gemm_codes.cuh", "i % 2 * 2 + row]);", "i % 2 * 2]);"),
    ("GEMM of int4 on Hopper, a long ring", "gemm_wgmma_codes.cuh", "__syncwarp();  // since", ";  // since"),
    ("GEMM of int8 on Hopper, shared tiles", "gemm_wgmma_codes.cuh", "(!Weight::kGroupScales)", "(false)"),
    ("GEMM of int8 on Hopper, shared tiles", "gemm_codes.cuh", "row + 8 * h", "row + h"),
    (
        "GEMM of int8 on Hopper, shared tiles",
        "gemm_codes.cuh",
        "sums[i] *= scales[i / 2 % 2]",
        "sums[i] *= scales[i % 2]",
    ),
    ("GEMM of int8 on Hopper, shared tiles", "gemm_wgmma_codes.cuh", "scales.apply(row_sums<Tiling>(sums, 0));", ";"),
    ("GEMM of int4 on Ampere", "gemm_mma.cuh", "warp * Weight::kPieceBytes", "warp / 4 * Weight::kPieceBytes"),
    ("GEMM on Ampere", "gemm_mma.cuh", "(2 * k_step + matrix / 2) ^ row", "(2 * k_step + matrix % 2) ^ row"),
    ("GEMM on Ampere", "gemm_mma.cuh", "pair * 2048", "pair * 1024"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "keys, i * 2 * key_chunk", "keys, i * key_chunk"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "values, n * 2 * eight", "values, n * eight"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "(group + 1) % Shape::groups", "group"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "wgmma_wait<1>(scores())", "wgmma_wait<2>(scores())"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "values_of(before.stage)", "values_of(place.stage)"),
    ("attention of many rows on Hopper", "attention_wgmma.cuh", "release(before.stage,", "release(place.stage,"),
    ("attention of many rows on Hopper", "attention_ring.cuh", "round / 2 % 2 ^ 1", "round % 2 ^ 1"),
    ("attention of many rows on Ampere", "attention.cuh", "16 * n + matrix / 2 * 8", "16 * n + matrix % 2 * 8"),
    (
        "attention of many rows in int8",
        "attention_widen.cuh",
        "(2 * c * kPageTokens + token), widened(bytes.x, bytes.y)",
        "(2 * c * kPageTokens + token), widened(bytes.y, bytes.x)",
    ),
    ("attention of many rows in int8", "attention_vectors.cuh", "= part > group;", "= part >= group;"),
    ("attention of many rows in int8 on Hopper", "attention_widen_ring.cuh", "thread < tokens ?", "thread <= tokens ?"),
    ("attention of many rows in int8 on Hopper", "attention_wgmma.cuh", "(kCoded<Shape>) __sync", "(false) __sync"),
    ("attention of many rows in int8", "attention_widen.cuh", "token < tokens", "token <= tokens"),
]


FP8 = {
    f"fp8 in {element}": partial(linear_case, "LinearBias", (3, 72, 200), (), weight=("f8", 0), dtype=element)
    for element in ("bf16", "f16")
}
"""Cases without a wait of their own."""

OFFSETS += [
    ("fp8 in bf16", "codes.cuh", "word & 0x87f087f0", "word & 0x87e087e0"),
    ("fp8 in bf16", "codes.cuh", "word >> 4 & 0x07000700", "word >> 4 & 0x03000300"),
    ("fp8 in bf16", "codes.cuh", "word << 4 & 0x80f080f0", "word << 4 & 0x80f000f0"),
    ("fp8 in f16", "codes.cuh", "word << 1 & 0x80008000", "word << 2 & 0x80008000"),
    ("fp8 in f16", "codes.cuh", "word & 0xbf80bf80, 0x5c005c00", "word & 0xbf80bf80, 0x58005c00"),
]


@pytest.mark.parametrize(("name", "header", "old", "new"), OFFSETS)
def test_no_offset_can_be_another_and_nothing_be_missing(name: str, header: str, old: str, new: str) -> None:
    assert is_noticed((CASES | FP8)[name](), header, old, new)


def is_noticed(case: Case, header: str, old: str, new: str) -> bool:
    """Whether the one line of a header that holds `old` may not hold `new`."""
    lines = (INCLUDE / header).read_text().split("\n")
    (line,) = [number for number, text in enumerate(lines, 1) if old in text]
    return not survives(case, Mutant(header, line, old, new), case.run(case.implementation))

"""Every offset and wait of products around a deferred norm is needed: when one is changed, it is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.schedules.cuda import norm
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.schedules.cuda.test_deferred_norm import deferred_call, moments_call
from tests.schedules.cuda.test_deferred_prompts import in_tiles
from tests.schedules.cuda.test_mutants import AMPERE, Case, is_noticed, linear_case, norm_case, unnoticed

BEHIND = deferred_call("LayerNormLinear", 20, 72, 640)
FEW_IN_FRONT = moments_call(7, 128, 200, columns=16)
FEW_BEHIND = deferred_call("LayerNormLinear", 7, 72, 640, columns=16)
MANY_BEHIND = deferred_call("LayerNormLinear", 70, 136, 256)
FEW = Gemv(6, 2, 2, 2, 1, shared_x=False)
NORMS: dict[str, Callable[[], Case]] = {
    "in front of a norm": lambda: norm_case(moments_call(20, 128, 200), Tiling(24, 2, 1, shared=False)),
    "behind a norm": lambda: norm_case(BEHIND, Tiling(24, 2, 1, shared=False)),
    "in front of a norm, few tokens": lambda: norm_case(FEW_IN_FRONT, FEW, weight="i8"),
    "behind a norm, few tokens": lambda: norm_case(FEW_BEHIND, FEW, weight="i8"),
    "in front, many tokens": lambda: norm_case(in_tiles(moments_call(70, 64, 64)), Tiling(48, 2, 1, shared=False)),
    "behind, many tokens": lambda: norm_case(MANY_BEHIND, Tiling(48, 2, 1, shared=False)),
    "behind, many tokens shared out": lambda: norm_case(MANY_BEHIND, Tiling(48, 2, 3)),
    "behind a norm on Ampere": lambda: norm_case(BEHIND, Tiling(32, 2, 1, shared=False), AMPERE),
}

OFFSETS = [
    ("in front of a norm", "gemm_epilogue.cuh", "/ kTile * L::kM + token(i)]", "/ kTile * L::kM + (token(i) ^ 1)]"),
    ("in front of a norm", "gemm_epilogue.cuh", "v[2] * scale[2]", "v[2] * scale[1]"),
    ("in front of a norm", "gemm_norm.cuh", "offset = 8;", "offset = 4;"),
    ("behind a norm", "gemm_norm.cuh", "part = share;", "part = share + kShares;"),
    ("behind a norm", "gemm_norm.cuh", "all.merge(shares[j * kColumns + i])", "all.merge(shares[i])"),
    ("behind a norm", "gemm_epilogue.cuh", "8 * j + 2 * t + c];", "8 * j + 2 * t];"),
    ("behind a norm", "gemm_epilogue.cuh", "norm.x * weight_sums[h]", "norm.x * weight_sums[0]"),
    ("behind a norm", "gemm_wgmma.cuh", "wait_for_previous();  // for the moments", ";"),
    ("behind a norm", "gemm_norm.cuh", "named_barrier(kNormBarrier, kThreads);", ";"),
    ("behind a norm", "gemm_wgmma.cuh", "mbarrier_arrive(&shared.normed[0]);", ";"),
    ("behind a norm", "gemm_wgmma.cuh", "mbarrier_wait(&shared.normed[0], 0);  // once it has been, it stays so", ";"),
    ("in front of a norm, few tokens", "gemv_norm.cuh", "moments[strip * G::kM + token]", "moments[strip * G::kM]"),
    ("in front of a norm, few tokens", "gemv_norm.cuh", "v[i] * rows.scales[i]", "v[i] * rows.scales[0]"),
    ("in front of a norm, few tokens", "gemv_norm.cuh", "offset = 16; offset > 2;", "offset = 16; offset > 4;"),
    ("behind a norm, few tokens", "gemv_norm.cuh", "first = warp_index() * kTogether;", "first = warp_index();"),
    ("behind a norm, few tokens", "gemv_norm.cuh", "template over_lanes<kLanes>()", "template over_lanes<32>()"),
    ("behind a norm, few tokens", "gemv_norm.cuh", "norm.x * rows.weight_sums[i]", "norm.x * rows.weight_sums[0]"),
    (
        "behind a norm, few tokens",
        "gemv_norm.cuh",
        "const float2 norm = norms[token];",
        "const float2 norm = norms[0];",
    ),
    ("behind a norm, few tokens", "gemv.cuh", "+ G::kWarps * Ring::kBytes;", "+ (G::kWarps - 1) * Ring::kBytes;"),
    ("behind a norm, few tokens", "gemv.cuh", "wait_for_previous();", ";"),
    ("behind a norm, few tokens", "gemv.cuh", "__syncthreads();", ";"),
    ("in front, many tokens", "gemm_norm.cuh", "second ? x[i] : x[2 + i], 8", "second ? x[2 + i] : x[i], 8"),
    (
        "behind, many tokens",
        "gemm_norm.cuh",
        "mbarrier_wait(&barriers[2 + stretch % 2], (stretch / 2 - 1) % 2)",
        "(void)0",
    ),
    ("behind, many tokens", "gemm_norm.cuh", "mbarrier_wait(&barriers[stretch % 2], stretch / 2 % 2);", ";"),
    ("behind, many tokens", "gemm_norm.cuh", "means_squared - means * means / kParts", "means_squared"),
    ("behind, many tokens shared out", "gemm_work.cuh", "return n_shared + (tile", "return (tile"),
    ("behind a norm on Ampere", "gemm_norm.cuh", "named_barrier(kNormBarrier, kThreads);", ";"),
]


def test_no_wait_of_a_norm_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a launch before a product: of a block with one row, or of one with several."""

    def left_out() -> set[str]:
        return set(unnoticed(linear_case("LayerNormLinearBiasRelu", (40, 72, 200), ("norm_rows.cuh",))))

    of_one = left_out()
    monkeypatch.setattr(norm, "MULTIPROCESSORS", 1)
    assert of_one
    assert not of_one & left_out()


@pytest.mark.parametrize(("name", "header", "old", "new"), OFFSETS)
def test_no_offset_can_be_another_and_nothing_be_missing(name: str, header: str, old: str, new: str) -> None:
    assert is_noticed(NORMS[name](), header, old, new)

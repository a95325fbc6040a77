"""Products of more than 16 tokens on the emulator, against their ONNX definitions; and how they are cut up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import Call, DType, TensorType, numpy_dtype
from llmc.compiler.target import CUDA_LEVELS, Target
from llmc.schedules.cuda.linear import gemm, gemm_tiles
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.call import LinearOp, parse
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from tests.emulator.emulate import EmulatedExecutable

Array = np.ndarray[Any, Any]
Define = Callable[..., list[Array]]

HOPPER, AMPERE, ADA = Target("cuda", "sm_90a"), Target("cuda", "sm_80"), Target("cuda", "sm_89")
EXACT = 1e-5
ROUNDING = {"bf16": 2**-8, "f16": 2**-11}
"""Errors as a share of the largest result: sums are in f32, and a tiled result is rounded once."""


def product_call(name: str, m: int, n: int, k: int, dtype: DType = "bf16", *, tiled_y: bool = False) -> Call:
    """A product of the Linear family: x [m, k] as it is multiplied, to y [m, n]."""
    rows = 2 * n if name.startswith("Gated") else n
    tiled = dtype != "f32"
    inputs = [TensorType((m, k), dtype, tiled=tiled), TensorType((rows, k), dtype, constant=True)]
    if "Bias" in name:
        inputs.append(TensorType((rows,), dtype, constant=True))
    if "Residual" in name:
        inputs.append(TensorType((m, n), "f32"))
    y = TensorType((m, n), dtype if tiled_y else "f32", tiled=tiled_y)
    return Call(f"llmc.{name}", tuple(inputs), (y,))


def random_inputs(call: Call) -> list[Array]:
    """Inputs whose products are of about the size of 1."""
    generator = np.random.default_rng(0)
    inputs = []
    for kind in call.inputs:
        assert kind is not None
        scale = kind.shape[-1] ** -0.5 if len(kind.shape) == 2 and kind.constant else 1.0
        inputs.append((generator.standard_normal(kind.shape) * scale).astype(numpy_dtype(kind.dtype)))
    return inputs


def check(call: Call, define: Define, params: Tiling | None = None, target: Target = HOPPER) -> None:
    """The call, cut up so or as the schedule would, gives what its definition does."""
    op = parse(call)
    assert op is not None
    inputs = random_inputs(call)
    implementation = gemm.implement(call, op, params or gemm.default_params(op, target), target)
    (y,) = EmulatedExecutable(call, implementation, target).run(*inputs)
    (expected,) = define(replace(call, outputs=(TensorType((op.m, op.n), "f32"),)), *inputs)
    tolerance = ROUNDING[op.element] if op.tiled_y else EXACT
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tiled_y"),
    [
        ("LinearBiasGeluResidual", (17, 100, 100), "bf16", False),
        ("LinearSilu", (24, 66, 130), "f16", True),
        ("LinearBiasRelu", (40, 203, 64), "bf16", True),
        ("GatedLinearSiluBias", (64, 100, 130), "bf16", True),
        ("GatedLinearGeluTanh", (100, 72, 100), "f16", False),
        ("LinearResidual", (128, 65, 72), "bf16", False),
        ("LinearBias", (130, 192, 200), "bf16", False),
    ],
    ids=str,
)
def test_odd_shapes_and_every_epilogue_are_right(
    define: Define, target: Target, name: str, shape: tuple[int, int, int], dtype: DType, tiled_y: bool
) -> None:
    check(product_call(name, *shape, dtype, tiled_y=tiled_y), define, target=target)


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((20, 130, 1000), Tiling(24, 3, 3)),  # two tiles of 16 steps in three blocks
        ((32, 64, 640), Tiling(32, 2, 10)),  # one tile, a step a block
        ((33, 260, 200), Tiling(40, 4, 2)),  # a round of whole tiles behind a shared one
        ((200, 130, 200), Tiling(48, 3, 3, band=3)),  # bands of 3 and 2 token tiles
        ((300, 130, 64), Tiling(160, 2, 4, shared=False, band=1)),
        ((260, 100, 130), Tiling(256, 2, 2, shared=True, band=2)),
    ],
    ids=str,
)
def test_hopper_may_cut_a_product_in_many_ways(define: Define, shape: tuple[int, int, int], tiling: Tiling) -> None:
    check(product_call("LinearBias", *shape), define, tiling)


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        ((20, 130, 1000), Tiling(32, 3, 3)),
        ((33, 260, 200), Tiling(48, 2, 2)),
        ((200, 130, 200), Tiling(48, 4, 3, band=3)),
    ],
    ids=str,
)
def test_so_may_the_others(define: Define, shape: tuple[int, int, int], tiling: Tiling) -> None:
    check(product_call("LinearBias", *shape), define, tiling, ADA)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tiled_y", "tiling"),
    [
        # one and a half tiles of 256 rows, shared out; the second block of the last has no rows
        ("LinearBias", (129, 300, 200), "bf16", False, Tiling(160, 2, 4, cluster=2)),
        ("LinearBias", (200, 100, 330), "f16", True, Tiling(112, 3, 6, band=2, cluster=2)),
        ("GatedLinearSiluBias", (256, 200, 130), "bf16", True, Tiling(256, 2, 4, cluster=2)),
        ("LinearBiasGeluResidual", (511, 130, 130), "bf16", False, Tiling(256, 2, 2, shared=False, band=2, cluster=2)),
        # the last 8 tokens are one block's to bring; a round of whole tiles behind a shared one
        ("LinearResidual", (136, 520, 200), "f16", False, Tiling(128, 3, 4, band=2, cluster=2)),
        ("GatedLinearGeluTanh", (150, 40, 64), "bf16", False, Tiling(160, 2, 2, shared=False, cluster=2)),
    ],
    ids=str,
)
def test_blocks_of_a_cluster_bring_each_other_their_tokens(
    define: Define, name: str, shape: tuple[int, int, int], dtype: DType, tiled_y: bool, tiling: Tiling
) -> None:
    check(product_call(name, *shape, dtype, tiled_y=tiled_y), define, tiling)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tiled_y", "tiling"),
    [
        ("LinearBias", (1, 130, 640), "bf16", False, Tiling(16, 2, 3, shared=False, along=True)),
        ("GatedLinearSiluBias", (7, 100, 256), "bf16", True, Tiling(16, 3, 2, shared=False, along=True)),
        ("LinearBiasGeluResidual", (33, 200, 250), "f16", False, Tiling(40, 2, 1, shared=False, along=True)),
        ("LinearResidual", (64, 65, 512), "bf16", False, Tiling(64, 3, 3, shared=True, along=True)),  # two in three
        ("Linear", (60, 200, 128), "bf16", True, Tiling(32, 2, 5, shared=False, band=2, along=True)),
    ],
    ids=str,
)
def test_warpgroups_may_share_k(
    define: Define, name: str, shape: tuple[int, int, int], dtype: DType, tiled_y: bool, tiling: Tiling
) -> None:
    check(product_call(name, *shape, dtype, tiled_y=tiled_y), define, tiling)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tiled_y", "tiling"),
    [
        # seven tiles of 4 steps through a ring of 3; the last 64 rows are not there
        ("LinearBias", (136, 400, 200), "bf16", False, Tiling(144, 3, 1, shared=False, turns=1)),
        ("LinearBiasGeluResidual", (70, 200, 130), "f16", False, Tiling(40, 2, 1, shared=False, turns=2, quick=True)),
        ("GatedLinearSiluBias", (130, 72, 200), "bf16", True, Tiling(136, 2, 2, turns=1, cluster=2, quick=True)),
        # six tiles in four clusters, two of them shared out; a second block without rows
        ("LinearResidual", (200, 260, 330), "bf16", False, Tiling(112, 3, 8, band=2, cluster=2, turns=2, quick=True)),
        ("Linear", (20, 130, 1000), "bf16", True, Tiling(24, 3, 3, turns=1)),
    ],
    ids=str,
)
def test_warpgroups_may_take_tiles_in_turn(
    define: Define, name: str, shape: tuple[int, int, int], dtype: DType, tiled_y: bool, tiling: Tiling
) -> None:
    check(product_call(name, *shape, dtype, tiled_y=tiled_y), define, tiling)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "tiled_y", "tiling"),
    [
        ("LinearBiasResidual", (300, 101, 72), "bf16", False, Tiling(160, 2, 2, shared=False, quick=True)),  # N is odd
        ("LinearSiluResidual", (288, 136, 130), "f16", True, Tiling(144, 2, 3, shared=False, quick=True)),
        ("LinearBiasResidual", (33, 200, 256), "bf16", False, Tiling(40, 2, 2, shared=False, along=True, quick=True)),
        ("LinearResidual", (256, 192, 64), "bf16", False, Tiling(128, 2, 2, quick=True)),  # all tiles are full
        ("GatedLinearSilu", (100, 72, 100), "f16", False, Tiling(112, 2, 2, shared=False, cluster=2, quick=True)),
    ],
    ids=str,
)
def test_a_tile_may_end_quickly(
    define: Define, name: str, shape: tuple[int, int, int], dtype: DType, tiled_y: bool, tiling: Tiling
) -> None:
    check(product_call(name, *shape, dtype, tiled_y=tiled_y), define, tiling)


@pytest.mark.parametrize("name", ["LinearBiasGeluResidual", "GatedLinearSiluBias"])
@pytest.mark.parametrize("m", [3, 65])
def test_weights_in_f32_are_multiplied_in_f32(define: Define, name: str, m: int) -> None:
    check(product_call(name, m, 70, 75, "f32"), define)


@pytest.mark.parametrize("name", ["RMSNormGatedLinearSilu", "LayerNormLinearBiasRelu"])
def test_a_norm_in_front_is_a_launch_of_its_own(define: Define, name: str) -> None:
    norm_vectors = 1 if name.startswith("RMS") else 2
    plain = product_call(name.removeprefix("RMSNorm").removeprefix("LayerNorm"), 24, 72, 136)
    vector = TensorType((136,), "bf16", constant=True)
    inputs = (TensorType((24, 136), "f32"), *[vector] * norm_vectors, *plain.inputs[1:])
    call = replace(plain, op=f"llmc.{name}", inputs=inputs, attributes=(("epsilon", 1e-5),))
    params = linear.match(call, HOPPER)
    assert params is not None
    implementation = linear.implement(call, params, HOPPER)
    assert len(implementation.launches) == 2
    arrays = random_inputs(call)
    (y,) = EmulatedExecutable(call, implementation, HOPPER).run(*arrays)
    (expected,) = define(call, *arrays)
    np.testing.assert_allclose(y, expected, rtol=0, atol=ROUNDING["bf16"] * np.abs(expected).max())


LAYERS = [
    (12288, 4096, False),
    (4096, 4096, False),
    (11008, 4096, True),
    (4096, 11008, False),
    (16384, 4096, False),
    (4096, 16384, False),
    (32000, 4096, False),
    (50272, 4096, False),
]
"""(n, k, gated) of the linear layers of Llama-2-7B and OPT-6.7B."""


def layer(m: int, n: int, k: int, gated: bool) -> LinearOp:
    return LinearOp(m, n, k, "bf16", "bf16", gated=gated, tiled_x=True)


@pytest.mark.parametrize("level", CUDA_LEVELS)
@pytest.mark.parametrize("m", [17, 32, 64, 100, 128, 512, 1024])
def test_every_tiling_covers_the_product_and_fits_the_machine(level: str, m: int) -> None:
    target = Target("cuda", level)
    device = gemm_tiles.DEVICES[target.arch]
    for shape in LAYERS:
        op = layer(m, *shape)
        for tiling in gemm.space(op, target):
            assert tiling.tokens * tiling.token_tiles(op) >= m
            assert tiling.shared_bytes(op) <= device.shared_bytes
            assert 0 < tiling.blocks <= device.n_blocks
            assert tiling.blocks % tiling.cluster == 0
            assert tiling.cluster == 1 or (device.wgmma and tiling.tokens >= 128)
            n_shared = tiling.n_shared(op)
            assert n_shared == 0 or tiling.workers <= n_shared * gemm_tiles.steps(op)


@pytest.mark.parametrize("m", [32, 64])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_few_tokens_are_cut_so_that_memory_is_the_limit_on_paper(m: int, shape: tuple[int, int, bool]) -> None:
    op = layer(m, *shape)
    device = gemm_tiles.DEVICES[HOPPER.arch]
    memory_us = gemm_tiles.weight_bytes(op) / device.memory
    fixed_us = 3 * device.fixed_us  # a launch, shared tiles, the last tile's way out
    assert gemm_tiles.cost_us(op, gemm.default_params(op, HOPPER), device) < 1.2 * memory_us + fixed_us


@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_clusters_are_offered_to_what_might_wait_for_l2(shape: tuple[int, int, bool]) -> None:
    _, *others = gemm.space(layer(1024, *shape), HOPPER)
    for m in (65, 100, 114, 127, 128, 512, 1024):
        assert gemm.default_params(layer(m, *shape), HOPPER).cluster == 1  # an H200 did not wait for it
    assert 2 in {tiling.cluster for tiling in others[:8] if not tiling.turns}
    assert {tiling.cluster for tiling in gemm.space(layer(64, *shape), HOPPER)} == {1}


def test_a_grid_is_whole_clusters_of_which_the_kernel_knows() -> None:
    call = product_call("Linear", 256, 1024, 256)
    op = parse(call)
    assert op is not None
    tiling = Tiling(256, 4, 8, cluster=2)
    (launch,) = gemm.implement(call, op, tiling, HOPPER).launches
    assert launch.grid == 8
    assert tiling.workers == tiling.n_tiles(op) == 4
    assert "__cluster_dims__(2, 1, 1)" in str(launch.kernel.build())
    assert "4 stages, 8 blocks in clusters of 2," in str(tiling)


def test_a_launch_says_what_it_moves_and_computes() -> None:
    call = product_call("GatedLinearSilu", 64, 96, 128, tiled_y=True)
    op = parse(call)
    assert op is not None
    implementation = gemm.implement(call, op, Tiling(64, 4, 2), HOPPER)
    (launch,) = implementation.launches
    assert launch.n_operations == 2 * 64 * 192 * 128
    assert launch.n_bytes == 4 * 2 * 8192 + 2 * 64 * (128 + 96)
    assert launch.kernel.dependent


def test_the_same_product_has_the_same_kernel_and_another_tiling_another() -> None:
    call = product_call("Linear", 32, 256, 256)
    op = parse(call)
    assert op is not None
    names = [
        gemm.implement(call, op, tiling, HOPPER).launches[0].kernel.name
        for tiling in (Tiling(32, 4, 2), Tiling(32, 4, 2), Tiling(32, 5, 2))
    ]
    assert names[0] == names[1] != names[2]

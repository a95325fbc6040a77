"""A norm between products whose weights are stored in different ways, as a head's behind a layer in codes: deferred
where both would, and what a GEMV hands on is what a GEMM takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.compiler.kernel import Call, DType
from llmc.compiler.target import Target
from llmc.schedules.cuda.deferred_norm import WIDE, settled
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.emulator.emulate import EmulatedExecutable
from tests.schedules.cuda.test_deferred_norm import (
    AMPERE,
    EXACT,
    HOPPER,
    ROUNDED,
    Define,
    close,
    deferred_call,
    defined,
    moments_call,
    random_inputs,
    stored_as,
)
from tests.schedules.cuda.test_linear import as_float

BEHIND = [
    ("RMSNormLinear", (1, 100, 64)),
    ("RMSNormLinear", (8, 203, 704)),
    ("RMSNormLinearBias", (3, 65, 192)),
    ("LayerNormLinear", (1, 72, 320)),
    ("LayerNormLinearBias", (7, 130, 128)),
    ("RMSNormGatedLinearSilu", (5, 72, 128)),
]


def check(define: Define, call: Call, target: Target, params: linear.Params) -> None:
    inputs = random_inputs(call)
    chosen = linear.implement_settled(call, params, target)
    (found,), (expected,) = EmulatedExecutable(call, chosen, target).run(*inputs), defined(define, call, inputs)
    close(found, expected, ROUNDED if call.outputs[0].tiled else EXACT)


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize(("name", "shape"), BEHIND, ids=str)
def test_a_gemm_takes_the_moments_of_a_gemvs_parts(
    define: Define, name: str, shape: tuple[int, int, int], target: Target
) -> None:
    call = deferred_call(name, *shape, tiled_y="Gated" in name, columns=16)
    tiling = Tiling(16, 3, 2, shared=False) if target == HOPPER else Tiling(32, 3, 2, shared=False)
    check(define, call, target, tiling)


@pytest.mark.parametrize("tiling", [Tiling(16, 2, 2, shared=False, along=True), Tiling(16, 3, 3)], ids=str)
def test_however_its_tiles_are_cut(define: Define, tiling: Tiling) -> None:
    check(define, deferred_call("LayerNormLinearBias", 8, 200, 640, columns=16), HOPPER, tiling)


def beside(call: Call, own: DType, other: DType) -> Call:
    """The call as the planner asks it: weights in `own` here, in `other` on the norm's other side."""
    call = call if own == "bf16" else stored_as(call, own)
    side = "in_front" if "Deferred" in call.op else "behind"
    return replace(call, attributes=tuple(sorted({**dict(call.attributes), side: other}.items())))


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize("width", [WIDE, 128])
@pytest.mark.parametrize(("front", "behind"), [("i4", "bf16"), ("bf16", "i8"), ("i8", "i4"), ("f8", "bf16")])
@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64, 65])
def test_both_products_decide_alike(m: int, front: DType, behind: DType, width: int, target: Target) -> None:
    prepares = settled(beside(moments_call(m, width, 64, columns=16), front, behind), target)
    applies = settled(beside(deferred_call("RMSNormLinear", m, 128, width, columns=16), behind, front), target)
    takes_few = behind != "bf16" or (width == WIDE and target == HOPPER)
    by_gemv = m <= 8 and front != "bf16" and takes_few
    deferred = by_gemv or 17 <= m <= 64
    assert prepares.op.endswith("Moments") == applies.op.startswith("llmc.Deferred") == deferred
    if deferred:
        assert as_float(prepares.outputs[2]).shape == (width // (16 if by_gemv else 64), m, 2)
        assert prepares.outputs[2] == applies.inputs[-1]
        families = [isinstance(linear.match(call, target), Gemv) for call in (prepares, applies)]
        assert families == [by_gemv, by_gemv and behind != "bf16"]

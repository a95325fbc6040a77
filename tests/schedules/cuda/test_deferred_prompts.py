"""A norm between two products of a prompt, deferred, on the emulator: each product against its ONNX definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call
from llmc.schedules import records
from llmc.schedules.cuda.deferred_norm import settled
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from tests.schedules.cuda.test_deferred_norm import (
    AMPERE,
    HOPPER,
    ROUNDED,
    Define,
    check_deferred,
    check_moments,
    check_quantised,
    close,
    deferred_call,
    defined,
    moments_call,
    random_inputs,
    run,
)
from tests.schedules.cuda.test_gemm_append import Layer, turned_and_appended
from tests.schedules.cuda.test_gemm_append import run as run_append
from tests.schedules.cuda.test_linear import linear_call


def in_tiles(call: Call) -> Call:
    """The product in front as a graph says it whose norms are deferred in prompts."""
    return replace(call, op=call.op.replace("Moments", "TileMoments"))


WAYS = {
    "two token tiles, one cut short": Tiling(112, 2, 2, False),
    "quick ends": Tiling(72, 2, 2, False, quick=True),
    "shared out": Tiling(96, 2, 4, band=2),
    "in clusters": Tiling(128, 2, 4, False, cluster=2),
    "in turns": Tiling(104, 2, 2, False, turns=2, quick=True),
    "in turns, of 64 rows": Tiling(48, 3, 2, False, band=3, turns=1, quick=True),
}


@pytest.mark.parametrize("way", ["two token tiles, one cut short", "shared out", "in turns, of 64 rows"])
def test_the_product_in_front_hands_on_what_the_norm_needs(define: Define, way: str) -> None:
    check_moments(define, in_tiles(moments_call(130, 192, 200, bias="turns" in way)), params=WAYS[way])


@pytest.mark.parametrize(
    ("name", "shape", "way"),
    [
        ("RMSNormGatedLinearSilu", (130, 136, 128), "quick ends"),
        ("LayerNormLinearBias", (130, 264, 320), "shared out"),
        ("RMSNormLinearBias", (131, 264, 128), "in clusters"),
        ("LayerNormLinearBiasRelu", (130, 264, 128), "in turns"),
    ],
)
def test_the_product_behind_normalises_its_sums(
    define: Define, name: str, shape: tuple[int, int, int], way: str
) -> None:
    call = deferred_call(name, *shape, tiled_y="Gated" in name or "Relu" in name)
    check_deferred(define, call, params=WAYS[way])


def test_quantised_weights_take_part(define: Define) -> None:
    call = deferred_call("RMSNormLinear", 130, 136, 128)
    check_quantised(define, call, "i8", 2 * ROUNDED, WAYS["two token tiles, one cut short"])


def test_means_of_many_deviations_are_not_lost_where_parts_are_merged(define: Define) -> None:
    """What products in front hand on is exact here; x itself is rounded beside its mean."""
    call = deferred_call("LayerNormLinear", 70, 64, 256)
    inputs = random_inputs(call, mean=200.0)
    (found,), (expected,) = (
        run(call, inputs, params=WAYS["two token tiles, one cut short"]),
        defined(define, call, inputs),
    )
    close(found, expected, 1e-4)


def test_a_product_that_appends_turns_what_it_has_normalised() -> None:
    """To the bit what two launches make of the product that applies the norm."""
    way = WAYS["in turns"]
    layer = Layer(130, 3, 1, 128, 128, k=128)
    call = deferred_call("RMSNormLinear", layer.m, layer.columns, layer.k)
    inputs, (_, step) = random_inputs(call), layer.inputs()
    (qkv,) = run(call, inputs, params=way)
    wanted, cache = turned_and_appended(layer, qkv, step)
    call = appending(layer, call)
    pool = layer.pool()
    queries, *_ = run_append(call, linear.implement(call, way, HOPPER), [*inputs, *step], pool)
    np.testing.assert_array_equal(pool, cache)
    np.testing.assert_array_equal(queries.view(np.uint16), wanted.view(np.uint16))


def appending(layer: Layer, call: Call) -> Call:
    """The product of the layer's queries, keys and values that applies a norm and appends."""
    plain = layer.appending()
    op = f"{call.op}{plain.op.removeprefix(layer.product().op)}"
    attributes = tuple(sorted((*plain.attributes, ("epsilon", 1e-5))))
    return replace(plain, op=op, inputs=(*call.inputs, *layer.step()), attributes=attributes)


# -- when it is done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [65, 2048])
def test_a_graph_says_that_it_is_done_and_only_hopper_does_it(m: int) -> None:
    front, behind = in_tiles(moments_call(m, 128, 192)), deferred_call("LayerNormLinearBias", m, 128, 192)
    layer = Layer(m, 3, 1, 128, 128, k=128)
    appends = appending(layer, deferred_call("RMSNormLinear", m, layer.columns, layer.k))
    for call in (front, behind, appends):
        assert settled(call, HOPPER) == call
        assert len(schedules.implement(call, HOPPER).launches) == 1
    assert settled(front, AMPERE) == linear_call("LinearResidual", m, 128, 192, tiled_x=True)
    assert settled(behind, AMPERE) == linear_call("LayerNormLinearBias", m, 128, 192)
    left = settled(appends, AMPERE)
    assert (left.op, left.inputs) == ("llmc.RMSNormLinearRotaryAppend", (*appends.inputs[:3], *layer.step()))
    for dtype in ("f16", "f32"):
        half = in_tiles(moments_call(m, 128, 192, dtype))
        assert not settled(half, HOPPER).op.endswith("Moments")


def test_what_was_measured_of_such_products_is_used_where_the_norm_is_deferred() -> None:
    """The same cuts are offered, in the same rings."""
    pairs = (
        (in_tiles(moments_call(2048, 4096, 11008)), linear_call("LinearResidual", 2048, 4096, 11008, tiled_x=True)),
        (deferred_call("RMSNormLinear", 2048, 12288, 4096), linear_call("RMSNormLinear", 2048, 12288, 4096)),
    )
    for call, plain in pairs:
        assert records.signature(call, HOPPER) == records.signature(plain, HOPPER)
        cuts = [set(linear.space(each, HOPPER)) for each in (call, plain)]
        assert cuts[0] == cuts[1]

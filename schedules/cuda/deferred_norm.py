"""Decides when a norm between two products is deferred to the sums of the second one, on a GPU
(compiler/ops/deferred_norm.py).

    tokens        bf16: 1 – 64 on Hopper, of narrow models and elsewhere 9 – 64;
                  in 8 or 4 bits: 1 – 8, 17 – 64;
                  on Hopper more, of a graph that says so             else
    in front      y, y ∘ g rounded and tiled, moments                 y
    behind        multiplies y ∘ g, normalises its sums               normalises, or is behind a launch that does

Both products must decide alike, so the decision depends only on what both calls say: the types of y ∘ g and of its
moments, and how both weights are stored (compiler/bind.py tells each call of the other's weight, where it
differs).  For up to 8 tokens and weights in 8 or 4 bits both products are GEMVs, else GEMMs.  A GEMM can take what a
GEMV has prepared, as a head in bf16 does behind a layer in int4; the other way round is not possible.

Moments are kept for each part of y that is finished at a time: 16 columns in a GEMV, 64 in a GEMM.  The operator has
moments of 16; the call as it is executed says which it is.  Operators with moments of 64 come from
passes/defer_norm_in_prompts.py, where a measurement has turned that on; the product behind sees it by its moments.

y ∘ g is rounded before the mean is taken away and before it is divided.  That is the same error relative to y as
rounding the norm itself would be.  bfloat16 has the range for it; float16 has not where sums grow large, so there the
norm stays a launch.  If the mean of y is c standard deviations, LayerNorm's rounding error is √(1 + c²) times as large.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.kernel import PART_COLUMNS, TILE_COLUMNS, Call, DType, TensorType
from llmc.compiler.target import Target

FEWEST, MOST = 1, 64
"""The fewest and the most tokens.  On an H200 a step of Llama-2-7B in bf16 is 1 % shorter so at one token, 2 % at 8, 5
– 10 % at 16 – 64."""

WIDE, FEWEST_ELSE = 3584, 9
"""Columns of x from which on Hopper's products are the GEMM's at any number of tokens (linear.LEAST_STREAMED); others
have a GEMV up to 8 tokens, which normalises x itself."""

FEW = 8
"""Tokens up to which products of weights in 8 or 4 bits are the GEMV's where a norm is deferred.  On an H200 a GEMV in
int8 that normalises x in each block was 3.5 – 5 µs slower than its bytes take, one that takes x as it is 2."""

FEWEST_QUANTISED = 17
"""The fewest tokens for weights in 8 or 4 bits that a GEMM multiplies: on paper fewer tokens have a GEMV that is as
much faster than the GEMM as the norms' launches take, with int4 by more."""

ELEMENT = "bf16"

QUANTISED: tuple[DType, ...] = ("i8", "f8", "i4", "z4")


def prepares(call: Call) -> bool:
    """Whether the call's operator prepares the norm behind it."""
    return call.op.startswith("llmc.Linear") and call.op.endswith("Moments")


def applies(call: Call) -> bool:
    """Whether the call's operator applies a norm that was prepared."""
    return call.op.startswith("llmc.Deferred")


def settled(call: Call, target: Target) -> Call:
    """The call as it is executed: with moments of its family's parts where the norm is deferred, and as the product
    without that where it is not.  Other calls are left alone."""
    if prepares(call):
        y, scaled, moments = call.outputs
        front, behind = call.inputs[1], call.attribute("behind", None)
        if not is_deferred(scaled, moments, stored(front), behind or stored(front), target):
            plain = call.op.removesuffix("Moments").removesuffix("Tile")
            return replace(call, op=plain, inputs=call.inputs[:-1], outputs=(y,))
        return replace(call, outputs=(y, scaled, moments_type(scaled, stored(front))))
    if applies(call):
        n = n_plain_inputs(call)
        scaled_x, parts, weight = call.inputs[n], call.inputs[n + 1], call.inputs[2 + is_layer(call)]
        in_front = call.attribute("in_front", None) or stored(weight)
        if not is_deferred(scaled_x, parts, in_front, stored(weight), target):
            rest = call.inputs[n + 2 + is_layer(call) :]
            return replace(call, op=call.op.replace("Deferred", ""), inputs=(*call.inputs[:n], *rest))
        return replace(call, inputs=(*call.inputs[: n + 1], moments_type(scaled_x, in_front), *call.inputs[n + 2 :]))
    return call


def stored(weight: TensorType | None) -> DType:
    """How a product's weight is."""
    assert weight is not None
    return weight.dtype


def moments_type(scaled: TensorType | None, front: DType) -> TensorType:
    """What moments beside y ∘ g are where the norm is deferred.  front: the weight of the product in front."""
    assert scaled is not None
    m, columns = scaled.shape
    return TensorType((columns // part_columns(m, front), m, 2), "f32")


def part_columns(m: int, weight: DType) -> int:
    """Columns of a part of y, for m tokens and products whose weights are stored so."""
    return PART_COLUMNS if by_gemv(m, weight) else TILE_COLUMNS


def by_gemv(m: int, weight: DType) -> bool:
    """Whether it is the GEMV that executes the products of a deferred norm."""
    return m <= FEW and weight in QUANTISED


def is_layer(call: Call) -> bool:
    return "LayerNorm" in call.op


def n_plain_inputs(call: Call) -> int:
    """Inputs in front of `scaled` and `moments`, and LayerNorm's `folded`: x, the norm's, the weight, and a bias."""
    return 3 + is_layer(call) + ("Bias" in call.op)


def in_prompts(moments: TensorType | None, columns: int) -> bool:
    """Whether the graph says that a norm of so many columns is deferred in steps of many tokens: by the parts whose
    moments there are."""
    return moments is not None and moments.shape[0] * TILE_COLUMNS == columns


def is_deferred(
    scaled: TensorType | None, moments: TensorType | None, front: DType, behind: DType, target: Target
) -> bool:
    """scaled: y ∘ g.  moments: of y's parts, as the graph says them.  front, behind: the weights of the products."""
    assert scaled is not None
    m, columns = scaled.shape
    if not scaled.tiled or scaled.dtype != ELEMENT:
        return False
    if m > MOST:
        return target.level == "sm_90a" and in_prompts(moments, columns)
    can_take = by_gemv(m, front) or not by_gemv(m, behind)
    return can_take and all(defers(m, columns, weight, target) for weight in (front, behind))


def defers(m: int, columns: int, weight: DType, target: Target) -> bool:
    """Whether a product of a weight that is stored so defers a norm of m tokens, if the one beside it does."""
    fewest = FEWEST_QUANTISED
    if weight == ELEMENT:
        fewest = FEWEST if columns >= WIDE and target.level == "sm_90a" else FEWEST_ELSE
    return fewest <= m <= MOST or by_gemv(m, weight)

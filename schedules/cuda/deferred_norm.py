"""When the norm between two products is deferred to the sums of the one behind, on a GPU (ops_deferred_norm.py).

    tokens      1 – 8       9 – 64                                     more
    in front    y           y, y ∘ g rounded and tiled, moments        y
    behind      normalises  multiplies y ∘ g, normalises its sums      behind a launch that normalises

Few tokens are normalised by each block for itself, and many are no burden as a launch.  Both products have to decide
alike, so that this is asked of what both see: the type of y ∘ g, and how their weights are stored.

y ∘ g is rounded before its mean is taken away and before it is divided: relative to y, as the norm itself would be.
bfloat16 has the range for it; float16 has not, where sums grow large, and keeps its launch.  Where the mean of y is as
large as c standard deviations, LayerNorm's error by rounding is √(1 + c²) times what it is otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from llmc.compiler.kernel import Call, TensorType

FEWEST, MOST = 9, 64
"""Tokens."""

FEWEST_QUANTISED = 17
"""Of weights in 8 or 4 bits, integers or not: on paper fewer tokens have a GEMV that is as much faster than the GEMM as
the norms' launches take, with int4 by more."""

ELEMENT = "bf16"


def prepares(call: Call) -> bool:
    """Whether the call's operator prepares the norm behind it."""
    return call.op.startswith("llmc.Linear") and call.op.endswith("Moments")


def applies(call: Call) -> bool:
    """Whether the call's operator applies a norm that was prepared."""
    return call.op.startswith("llmc.Deferred")


def settled(call: Call) -> Call:
    """The call as it is executed: as it stands where the norm is deferred, and as the product without that where it is
    not.  Other calls are left alone."""
    if prepares(call) and not is_deferred(call.outputs[1], call.inputs[1]):
        return replace(call, op=call.op.removesuffix("Moments"), inputs=call.inputs[:-1], outputs=call.outputs[:1])
    if applies(call):
        n = n_plain_inputs(call)
        if not is_deferred(call.inputs[n], call.inputs[2 + is_layer(call)]):
            return replace(call, op=call.op.replace("Deferred", ""), inputs=call.inputs[:n])
    return call


def is_layer(call: Call) -> bool:
    return "LayerNorm" in call.op


def n_plain_inputs(call: Call) -> int:
    """Inputs in front of `scaled` and `moments`, and LayerNorm's `folded`."""
    return len(call.inputs) - 2 - is_layer(call)


def is_deferred(scaled: TensorType | None, weight: TensorType | None) -> bool:
    """scaled: y ∘ g.  weight: of either product."""
    assert scaled is not None
    assert weight is not None
    fewest = FEWEST if weight.dtype == ELEMENT else FEWEST_QUANTISED
    return scaled.tiled and scaled.dtype == ELEMENT and fewest <= scaled.shape[0] <= MOST

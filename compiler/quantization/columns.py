"""Scales for columns of weights, by how large what they meet is in a text.

A product stays what it is where a column of its weight is multiplied by s and what it meets there is divided by s,
which a norm does with its own weight, and a product with the rows of its own:

    (x g / s) @ (W s)ᵀ  =  (x g) @ Wᵀ

What changes is what rounding costs.  In trained models some columns of x are many times as large as others.  Beside
them the others of a block lose digits when x is rounded to int8, and the weights that meet the large ones are rounded
no better than those that hardly count.  With s a power of x's root mean square, x is more even, and the weights that
count are larger among those that share their scale (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438; AWQ, Lin et al.
2023, arXiv:2306.00978, which search the exponent).  Here s is a power of two, so that scaling rounds no number.

Not every model gains: where inputs are even already, scales only spread the weights that share one.  So some rows of
the weights are fitted both ways, and columns are scaled where that leaves less of an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph.stream import Stream
from llmc.compiler.quantization.feedback import fit_to_inputs
from llmc.compiler.quantization.inputs import round_inputs
from llmc.compiler.weights import Array, Weight

if TYPE_CHECKING:
    from llmc.compiler.quantization.calibrate import Calibration
    from llmc.compiler.quantization.quantize import Scheme

EXPONENT = 0.35
"""Of a column's root mean square."""
MOST_TOKENS = 2048
"""Of the text: a root mean square needs fewer than a fit does."""
TRIED_ROWS = 64
"""Of a weight, that are fitted to see whether it gains."""
LEAST = 8
"""Octaves below the median from which on columns are all the same: one that carries nothing says nothing."""


class Columns:
    """Column scales and the weights that are made with them, once for all graphs of a model, which share their
    constants.  of: scales, float32 [K], by the weight that is to divide by them."""

    def __init__(self, calibration: Calibration) -> None:
        self.sequences = thinned(calibration.sequences)
        self.of: dict[Weight, Array] = {}
        self._made: dict[tuple[Weight, int, int, int], Weight] = {}

    def measure(
        self, graph: ir.Graph, wanted: Mapping[ir.Value, tuple[Weight, Sequence[Weight]]], scheme: Scheme
    ) -> None:
        """Have scales for some values [M, K], each with the weight that is to divide it and those that multiply it:
        runs a step graph as far as the last of them that is new.  Where nothing is gained they are ones."""
        lacking = {value: weights for value, weights in wanted.items() if weights[0] not in self.of}
        stream = Stream(graph, self.sequences)
        for node in graph:
            if not lacking:
                return
            stream.run(node)
            for value in node.outputs:
                if value in lacking:
                    dividing, multiplying = lacking.pop(value)
                    inputs = stream.values[value]
                    scales = scales_for(inputs)
                    self.of[dividing] = scales if gains(scales, inputs, multiplying, scheme) else np.ones_like(scales)

    def scaled(self, weight: Weight, scales: Array, power: int, axis: int, first: int = 0) -> Weight:
        """The weight times scales ** power along an axis, from its entry `first` there on."""
        key = weight, power, axis, first
        if key not in self._made:
            factors = np.ones(weight.dims[axis], np.float32)
            factors[first:] = scales ** np.float32(power)
            factors = factors.reshape([-1 if i == axis else 1 for i in range(len(weight.dims))])
            self._made[key] = Weight.computed(
                f"{weight.name}.scaled",
                weight.dims,
                lambda: weight.unrounded().astype(np.float32) * factors,
                weight.stored_dtype,
                ("scaled", axis, power, weight),
                weight.coded,
            )
        return self._made[key]


def divides(weight: Weight) -> bool:
    """Whether a weight has been scaled to divide what it makes."""
    while weight.made_of and weight.made_of[0] == "scaled":
        _, _, power, before = weight.made_of
        if power == -1:
            return True
        assert isinstance(before, Weight)
        weight = before
    return False


def thinned(sequences: Sequence[Array]) -> list[Array]:
    """Every second sequence, or fourth, …, so that not many more than MOST_TOKENS are left."""
    kept = list(sequences)
    while len(kept) > 1 and sum(map(len, kept)) > 1.5 * MOST_TOKENS:
        kept = kept[::2]
    return kept


def scales_for(inputs: Sequence[Array]) -> Array:
    """The scales, float32 [K], for what columns meet, float32 [tokens, K] of each sequence: powers of two around 1."""
    squares = np.stack([np.square(x, dtype=np.float64).mean(0) for x in inputs]).mean(0)
    octaves = np.log2(np.maximum(squares, np.finfo(np.float64).tiny)) / 2
    octaves -= np.median(octaves)
    scales: Array = np.exp2(np.rint(EXPONENT * np.maximum(octaves, -LEAST))).astype(np.float32)
    return scales


def gains(scales: Array, inputs: Sequence[Array], weights: Sequence[Weight], scheme: Scheme) -> bool:
    """Whether the products of inputs, float32 [tokens, K] of each sequence, and some rows of the weights are nearer to
    what they are where columns are scaled, when both are rounded as for a CPU."""
    if (scales == 1).all():
        return False
    x = np.concatenate(list(inputs))
    rows = np.concatenate([some_rows(weight) for weight in weights])
    products, exact = x.T @ x, x @ rows.T

    def error(scales: Array) -> float:
        fitted = fit_to_inputs(rows * scales, products / scales / scales[:, None], scheme).values()
        return float(np.square(round_inputs(x / scales, scheme) @ fitted.T - exact, dtype=np.float64).sum())

    return error(scales) < error(np.ones_like(scales))


def some_rows(weight: Weight) -> Array:
    """Float32 [n, K]."""
    array = weight.unrounded()
    return array[:: max(1, len(array) // TRIED_ROWS)][:TRIED_ROWS].astype(np.float32)

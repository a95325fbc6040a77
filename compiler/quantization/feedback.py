"""Codes of a weight, fitted to the inputs of its layer: later columns make up for the rounding of earlier ones.

Where a row w of a layer's weight becomes q = w - e, its results for the inputs X [tokens, K] are off by X eᵀ.  The
square of that is e H eᵀ with H = Xᵀ X, and, with H = R Rᵀ, R upper triangular, the sum over columns k of

    (d_k · (e_k + Σ_{i<k} u_ik e_i))²          u_ik = R_ik / R_kk, d_k = R_kk

So columns are rounded one after the other: the best code for column k is the one nearest to w_k + Σ_{i<k} u_ik e_i, and
the square of its error counts d_k² times.  That is GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ
(Chee et al. 2023, arXiv:2307.13304).  The scale of a group is searched as it is without inputs (quantize.py), but for
the values that are about to be rounded, and with each squared error counted so many times.

Columns keep their order, so that codes and scales lie as they always do.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from llmc.compiler.quantization.quantize import Quantized, Scheme, best_scales, finite, half_scales, round_to_codes
from llmc.compiler.weights import Array

DAMPING = 0.1
"""This share of the mean of H's diagonal is added to the diagonal.  So columns that are hardly ever used are rounded
nearly as they are, and what a few thousand tokens say by chance is not believed: for random layers, measured on tokens
not seen before, 0.01 was worse with few tokens (512 for K = 512: worse than rounding) and 1 with many."""
BLOCK = 128
"""So many columns are rounded before one matrix product carries their errors to all columns behind them.  Groups do not
straddle blocks."""
ROWS = 1024
"""Rows of the weight at a time."""


def fit_to_inputs(weight: Array, products: Array, scheme: Scheme, name: str = "weight") -> Quantized:
    """The codes and scales of a weight [rows, K] for inputs x with these sums of products: Σ xᵀ x, float32 [K, K].

    The same on every run on a machine.  Overwrites `products`.  Raises LlmcError: a weight that is not finite.
    """
    n_rows, k = weight.shape
    codes = np.empty((n_rows, k), scheme.numpy_dtype)
    scales = np.empty((n_rows, ceil(k / (scheme.group or k))), np.float16 if scheme.group else np.float32)
    feedback, importance = triangle(products)
    for first in range(0, n_rows, ROWS):
        rows = slice(first, first + ROWS)
        columns = np.ascontiguousarray(finite(weight[rows].astype(np.float32), name).T)
        found = fit_columns(columns, feedback, importance, scheme)
        codes[rows], scales[rows] = found[0].T, found[1].T
    return Quantized(codes, scales, scheme)


def triangle(products: Array) -> tuple[Array, Array]:
    """u (ones on its diagonal) [K, K] and d² [K, 1] of H = R Rᵀ, for H of a mean diagonal of one.  Overwrites H.

    Below its diagonal u is not set.  Where H is not positive definite in float32 the damping grows until it is.
    """
    products /= float(products.diagonal().mean(dtype=np.float64)) or 1.0
    diagonal = products.diagonal().copy()
    damping = DAMPING
    while True:
        np.fill_diagonal(products, diagonal + np.float32(damping))
        try:
            factor(products)
        except np.linalg.LinAlgError:
            mirror(products)
            damping *= 10
            continue
        lengths = products.diagonal().copy()
        products /= lengths
        return products, np.square(lengths)[:, None]


def factor(matrix: Array) -> None:
    """Overwrite the upper triangle of H with R, H = R Rᵀ, from the last columns to the first: nothing of H's size is
    needed besides.  Raises LinAlgError: not positive definite."""
    k = len(matrix)
    for start in reversed(range(0, k, BLOCK)):
        stop = min(start + BLOCK, k)
        panel = matrix[:stop, start:stop] - matrix[:stop, stop:] @ matrix[start:stop, stop:].T
        own = np.linalg.cholesky(panel[start:][::-1, ::-1])[::-1, ::-1]
        matrix[:start, start:stop] = np.linalg.solve(own, panel[:start].T).T
        rows, columns = np.triu_indices(stop - start)
        matrix[start + rows, start + columns] = own[rows, columns]


def mirror(matrix: Array) -> None:
    """Copy what lies below the diagonal above it."""
    for row in range(len(matrix)):
        matrix[:row, row] = matrix[row, :row]


def fit_columns(columns: Array, feedback: Array, importance: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Codes [K, rows] and scales float32 [groups, rows] of a weight that is turned, [K, rows].

    feedback: u, importance: d², see `triangle`.
    """
    k, n_rows = columns.shape
    errors = np.empty_like(columns)
    codes = np.empty((k, n_rows), scheme.numpy_dtype)
    scales = [] if scheme.group else [best_scales(columns, 0, scheme, importance)]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        targets = columns[start:stop] + feedback[:start, start:stop].T @ errors[:start]
        for column in range(start, stop):
            if scheme.group and column % scheme.group == 0:
                group = slice(column, min(column + scheme.group, k))
                wanted = targets[column - start : group.stop - start]
                scales.append(half_scales(best_scales(wanted, 0, scheme, importance[group])))
            codes[column] = round_to_codes(targets[column - start], scales[-1], scheme)
            errors[column] = columns[column] - codes[column].astype(np.float32) * scales[-1]
            targets[column - start + 1 :] += feedback[column, column + 1 : stop, None] * errors[column]
    return codes, np.stack(scales)

"""Weights in 4 bits with a zero for each group: what AWQ, GPTQ with zeros, and Q4_1 and Q4_K of GGUF files keep.

    w[k]  =  (code[k] - zero) * scale           codes -8 … 7, zero and scale float16

A minimum m comes to the same: d q - m is d (q - m / d).  Values that are such numbers already are recognised by their
differences, which are all multiples of one step, 15 steps at most.  The step is searched among the fractions of the
widest difference: first as a float16, which AWQ and GPTQ have, then as any number, since Q4_K's step is a product of
two numbers and its values are rounded in float32.  Codes are moved so that the zero is small, where float16 has the
most digits: a whole zero is then exact, another is off by less than 2**-8 of a step.

For other values several roundings are tried, each with the zero and the scale that leave the least squared error for
it, and the best is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmc.compiler.weights import Array

LEAST, MOST = -8, 7
STEPS = MOST - LEAST
SAMPLE = 16
"""So many values are checked first: most groups that have no step show it there."""
CLOSE = 2.0**-6
"""As a part of a step: a value that is no farther from a code's place is that code.  The rounding of scale and zero
moves it by no more."""
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""The ranges of codes that are tried, as parts of the distance from the least value to the largest."""
FARTHEST = 64.0
"""Steps that a zero may be away from 0, or from -8: beyond, float16 would round it to more than a step's 32nd part."""
LARGEST = float(np.finfo(np.float16).max)


class Zeros(NamedTuple):
    """codes: int8 [size, n].  scales, zeros: float16 [n].  are_own: bool [n]: which groups were such codes already."""

    codes: Array
    scales: Array
    zeros: Array
    are_own: Array


def fit_zeros(values: Array) -> Zeros:
    """The codes, scales and zeros of values [size, n], float32, in which each column is a group."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of what is then not taken
        return own_or_best_zeros(values)


def own_or_best_zeros(values: Array) -> Zeros:
    least, largest = values.min(0), values.max(0)
    steps = own_steps(values, least, largest - least)
    codes, scales, zeros = coded(values, least, steps)
    are_own = (steps > 0) & are_met(values, codes, scales, zeros, steps)
    are_own |= ~values.any(0)
    others = np.flatnonzero(~are_own)
    if others.size:
        codes[:, others], scales[others], zeros[others] = best_zeros(np.take(values, others, 1))
    return Zeros(codes.astype(np.int8), scales.astype(np.float16), zeros.astype(np.float16), are_own)


def own_steps(values: Array, least: Array, spans: Array) -> Array:
    """The step whose multiples all differences of a column are, float32 [n]; 0 where there is none."""
    steps: Array = np.where(spans > 0, np.float32(0), np.abs(least) / np.float32(MOST))
    for are_halves in (True, False):
        for n_steps in range(STEPS, 0, -1):
            left = np.flatnonzero((steps == 0) & (spans > 0))
            tried = spans[left] / np.float32(n_steps)
            if are_halves:
                is_half = tried == rounded_halves(tried)
                left, tried = left[is_half], tried[is_half]
            for part in (values[:SAMPLE], values):
                are_codes = are_multiples(np.take(part, left, 1) - least[left], tried)
                left, tried = left[are_codes], tried[are_codes]
            steps[left] = tried * common_factors(np.take(values, left, 1) - least[left], tried)
    return steps


def common_factors(differences: Array, steps: Array) -> Array:
    """The common factor of each column's differences, counted in steps: a group with few of the codes may have a longer
    step too."""
    factors = np.ones(len(steps), np.float32)
    left = np.arange(len(steps))
    for part in (differences[:SAMPLE], differences):
        multiples = np.rint(np.take(part, left, 1) / steps[left]).astype(np.uint8)
        factors[left] = np.gcd.reduce(multiples, axis=0)
        left = left[factors[left] != 1]
    return np.maximum(factors, 1)


def are_multiples(differences: Array, steps: Array) -> Array:
    """Whether all of a column are whole multiples of its step, nearly."""
    multiples = differences / steps
    return np.asarray((np.abs(multiples - np.rint(multiples)) <= CLOSE).all(0))


def coded(values: Array, least: Array, steps: Array) -> tuple[Array, Array, Array]:
    """Codes, scales and zeros, float32, of columns that begin at `least` and go on in these steps."""
    scales = rounded_halves(steps)
    multiples = np.clip(np.rint((values - least) * inverse_of(steps)), 0, STEPS)
    first = np.clip(np.rint(least * inverse_of(scales)), LEAST, MOST - multiples.max(0))
    codes: Array = multiples + first
    zeros = (codes - values / scales).mean(0)  # of whole quotients it is whole
    return codes, scales, rounded_halves(np.where(np.isfinite(zeros), zeros, np.float32(0)))


def are_met(values: Array, codes: Array, scales: Array, zeros: Array, steps: Array) -> Array:
    """Whether codes, scales and zeros make the values, up to the rounding of these two."""
    are_near = np.abs((codes - zeros) * scales - values) <= np.float32(CLOSE) * steps
    return np.asarray(are_near.all(0) & (np.abs(zeros) <= FARTHEST))


def best_zeros(values: Array) -> tuple[Array, Array, Array]:
    """Codes, scales and zeros, float32, that leave the least squared error of those tried."""
    unit = np.float32(2.0 ** np.floor(np.log2(max(float(np.abs(values).max()), 2.0**-126))))
    values = values / unit  # exact, and no square of it overflows
    least, largest = values.min(0), values.max(0)
    floor = np.maximum(np.abs(least), np.abs(largest)) / np.float32(FARTHEST)
    mean = values.mean(0)
    apart = values - mean
    kept = np.full_like(mean, -1)
    scales, starts = np.zeros_like(mean), np.zeros_like(mean)
    for share in SHARES:
        steps = np.maximum((largest - least) * np.float32(share / STEPS), floor)
        start = least + (largest - least) * np.float32((1 - share) / 2)
        codes = np.clip(np.rint((values - start) * inverse_of(steps)), 0, STEPS)
        center = codes.mean(0)
        codes -= center
        along, square = (apart * codes).sum(0), (codes * codes).sum(0)
        slope = np.maximum(along * inverse_of(square), floor)
        gain = 2 * slope * along - slope * slope * square
        better = gain > kept
        np.copyto(kept, gain, where=better)
        np.copyto(scales, slope, where=better)
        np.copyto(starts, mean - slope * center, where=better)
    scales = rounded_halves(scales * unit)
    inverse = inverse_of(scales)
    zeros = rounded_halves(LEAST - starts * unit * inverse)
    codes = np.clip(np.rint(values * unit * inverse + zeros), LEAST, MOST)
    return codes, scales, zeros


def rounded_halves(numbers: Array) -> Array:
    """The nearest numbers that float16 has, in float32."""
    nearest: Array = np.clip(numbers, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)
    return nearest


def inverse_of(values: Array) -> Array:
    """1 / values in float32, 0 where that is no finite number."""
    inverse = np.float32(1) / values
    result: Array = np.where(np.isfinite(inverse), inverse, np.float32(0))
    return result

"""Weights in 8 or 4 bits: codes, and scales that make the squared error small.

    w[n, k]  ~  code[n, k] * scale[n, k // group]

    int8    codes -127 … 127; one f32 scale a row
    int4    codes -8 … 7; an f16 scale for each group of 32 or 128 along k, and an f16 zero, which is subtracted from
    its
            codes, where a checkpoint's codes have zeros (zeros.py)
    fp8     codes are floats of 8 bits, e4m3fn (4 bits of exponent, 3 of mantissa, up to 448, no infinity); scales as in
            int8
    mxfp4   for experts only: codes are twice a float of 4 bits, e2m1: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives; the
            scale of each group of 32 is a power of two

A weight whose values are such numbers already keeps them exactly.

Scales are searched, not read off the largest weight.  For a given rounding w ~ code * s, the best s is
<w, code> / <code, code>, and it leaves <w, w> - <w, code>² / <code, code>; so several roundings are tried, each with
the group's extreme weight at another code, and the one with the largest <w, code>² / <code, code> is kept.  In int4 a
scale has the sign that puts the extreme on the side of -8, which reaches further than 7.  In fp8 the candidates are the
codes of one octave: what differs is where in it the large weights lie, which have the largest errors.

Weights that are such codes and scales already, of a checkpoint that was quantised, keep them (own_scales.py).

A `QuantizedWeight` stands in the graph for the values it stores: everything that reads it as an array, ONNX Runtime
too, sees codes times scales, in float32.  Reading works through a weight some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmc.compiler.kernel import numpy_dtype
from llmc.compiler.quantization.mxfp4 import fit_powers
from llmc.compiler.quantization.own_scales import own_scales
from llmc.compiler.quantization.zeros import fit_zeros
from llmc.compiler.weights import Array, Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.quantization.calibrate import Calibration

Bits = Literal[4, 8]
Number = Literal["int", "fp", "mx"]
CodeDType = Literal["i8", "i4", "z4", "f8", "m4"]
SCHEMES = ("int8", "int4", "fp8", "mxfp4")
USE_INT4 = "use --quant int4"
GROUPS = (32, 128)
"""Weights that may share a scale in int4."""
MX_GROUP = 32
"""Weights that share a scale in mxfp4."""

SAMPLED_ROWS = 8
"""So many rows of a weight are checked for being codes and scales already; if none is, none is looked for."""
_WORKERS = 2
_BLOCK_BYTES = 512 << 10
"""float32 values that are searched at a time: they and two arrays of results stay in a core's caches."""

LEVELS: Mapping[CodeDType, tuple[int, int]] = {"i8": (-127, 127), "i4": (-8, 7), "z4": (-8, 7), "f8": (-448, 448)}
EXTREMES: Mapping[CodeDType, tuple[float, ...]] = {
    "i8": (127.0, 131.0, 136.0),
    "i4": (8.0, 6.25, 7.0, 7.5, 8.5, 9.0, 9.75),
    "z4": (8.0, 6.25, 7.0, 7.5, 8.5, 9.0, 9.75),
    "f8": (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0),
}
"""Where the group's extreme weight may lie, in codes, before rounding and clipping."""

LEAST_NORMAL = 2.0**-6
"""The smallest normal number of e4m3; smaller codes are multiples of 2**-9."""


@dataclass(frozen=True)
class Scheme:
    """How a model's weights are quantised.

    bits: 8 or 4.  number: codes are integers, or floats of 8 bits ("fp") or 4 ("mx").
    group: weights of a row that share a scale; 0 is the whole row.
    lm_head: whether the product that makes the logits is quantised as the others are; None: in 8 bits, if it is large.
    calibration: what weights are fitted to; None: to nothing but themselves.
    zeros: whether groups have zeros; of single weights, whose checkpoint has them.
    most_bits: of a weight on average, but for the logits' product, where some are to have 8; None: all are alike.
    wide: the names of the parameters that have 8 (importance.py).
    """

    bits: Bits
    group: int = 0
    lm_head: bool | None = None
    number: Number = "int"
    calibration: Calibration | None = field(default=None, compare=False, repr=False)
    zeros: bool = False
    most_bits: float | None = None
    wide: frozenset[str] = frozenset()

    @classmethod
    def parse(
        cls, name: str, group: int | None = None, lm_head: bool | None = None, most_bits: float | None = None
    ) -> Scheme | None:
        """The scheme that `--quant NAME --quant-group GROUP --quant-bits BITS` asks for, None for "none"."""
        if name == "none":
            asked = {"--quant-group": group, "--quant-lm-head": lm_head, "--quant-bits": most_bits}
            if option := next((option for option, value in asked.items() if value), None):
                raise LlmcError(f"{option} says how to quantise, but nothing is", place="--quant none", hint=USE_INT4)
            return None
        if name not in SCHEMES:
            fact = f"llmc quantises to {', '.join(SCHEMES)}"
            raise LlmcError(fact, place=f"--quant {name}", hint="use --quant int8")
        if name != "int4" and group:
            fact = f"{name} weights have one scale {'for each 32' if name == 'mxfp4' else 'a row'}"
            raise LlmcError(fact, place=f"--quant-group {group}", hint=f"{USE_INT4}, or leave the group out")
        if name != "int4" and most_bits is not None:
            fact = "--quant-bits chooses between 4 and 8 bits"
            raise LlmcError(fact, place=f"--quant {name}", hint=f"{USE_INT4}, or leave the bits out")
        if group not in (None, *GROUPS):
            raise LlmcError(f"groups are of {GROUPS[0]} or {GROUPS[1]} weights", place=f"--quant-group {group}")
        if name == "mxfp4":
            return cls(4, MX_GROUP, lm_head, "mx")
        if name == "int4":
            return cls(4, group or GROUPS[0], lm_head, most_bits=most_bits)
        return cls(8, 0, lm_head, "fp" if name == "fp8" else "int")

    @property
    def name(self) -> str:
        return "mxfp4" if self.number == "mx" else f"{self.number}{self.bits}"

    @property
    def of_experts_alone(self) -> bool:
        """Whether only experts are stored so; other weights become int8, or stay as they are."""
        return self.number == "mx"

    @property
    def in_8_bits(self) -> Scheme:
        """The scheme for a weight that gets 8 bits whatever the others have: int8, with a scale a row."""
        return replace(self, bits=8, group=0, number="int", zeros=False, most_bits=None, wide=frozenset())

    @property
    def dtype(self) -> CodeDType:
        """How codes are stored."""
        if self.number == "int":
            return "i8" if self.bits == 8 else "z4" if self.zeros else "i4"
        return "f8" if self.number == "fp" else "m4"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """How NumPy holds codes: ml_dtypes.float8_e4m3fn, or int8."""
        return numpy_dtype("f8" if self.number == "fp" else "i8")

    def __str__(self) -> str:
        said = (
            f"groups of {self.group}" * bool(self.group),
            "zeros" * self.zeros,
            "lm_head" * bool(self.lm_head),
            "calibrated" * bool(self.calibration),
            f"up to {self.most_bits} bits" * (self.most_bits is not None),
        )
        return ", ".join([self.name, *filter(None, said)])


@dataclass(frozen=True)
class Quantized:
    """A weight [rows, K] as it is stored.

    codes: int8 [rows, K], in fp8 ml_dtypes.float8_e4m3fn.
    scales: [rows, ceil(K / group)], float16 in int4, else float32; in mxfp4 half of what its numbers are multiplied by.
    zeros: float16, as many, what codes are less by; None: nothing.
    kept: the share of scales whose weights were codes and a scale already, and are what they were; unless fitted.
    """

    codes: Array
    scales: Array
    scheme: Scheme
    kept: float = 0.0
    zeros: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        rows, k = self.codes.shape
        return rows, k

    @property
    def n_bytes(self) -> int:
        """In memory."""
        return sum(array.nbytes for array in (self.codes, self.scales, self.zeros) if array is not None)

    def values(self) -> Array:
        """(codes - zeros) * scales, float32 [rows, K]."""
        values: Array = self.codes.astype(np.float32)
        if self.zeros is not None:
            values -= self._by_columns(self.zeros)
        values *= self._by_columns(self.scales)
        return values

    def rows(self, some: slice) -> Quantized:
        """Some of its rows."""
        zeros = None if self.zeros is None else self.zeros[some]
        return Quantized(self.codes[some], self.scales[some], self.scheme, self.kept, zeros)

    def _by_columns(self, of_groups: Array) -> Array:
        """float32 [rows, K], or [rows, 1] where all of a row are one group."""
        wide: Array = of_groups.astype(np.float32)
        return np.repeat(wide, self.scheme.group, axis=1)[:, : self.shape[1]] if self.scheme.group else wide


class QuantizedWeight(Weight):
    """A weight [rows, K] that is stored as codes and scales, made when it is read; or one of experts, [E, rows, K], the
    codes and scales of E times as many rows.

    group: weights of a row that share a scale, 0 for all.
    fit: works out the codes and scales; None: from the weight alone (`quantize`).
    kept: Quantized.kept when it was last worked out; None before.
    """

    fit: Callable[[], Quantized] | None = None
    kept: float | None = None

    def __init__(self, source: Weight, scheme: Scheme) -> None:
        super().__init__(f"{source.name}.{scheme.name}", source.dims, self.stored)
        self.source, self.scheme, self.group = source, scheme, scheme.group
        self.stored_dtype = scheme.dtype
        self.made_of = (scheme, source)

    def quantized(self) -> Quantized:
        """The codes and scales, worked out now.  Raises LlmcError for a weight that is not finite."""
        if self.fit is not None:
            quantized = self.fit()
        else:
            array = self.source.unrounded()
            quantized = quantize(array.reshape(-1, array.shape[-1]), self.scheme, str(self.source.name))
        self.kept = quantized.kept
        return quantized

    def stored(self) -> Array:
        """The values that the codes and scales stand for, float32."""
        return self.quantized().values().reshape(self.dims)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, without padding."""
        *rows_of_each, k = self.dims
        rows = prod(rows_of_each)
        of_group = 4 if self.scheme.zeros else 2
        return ceil(rows * k * self.scheme.bits / 8) + rows * (of_group * ceil(k / self.group) if self.group else 4)


def quantize(array: Array, scheme: Scheme, name: str = "weight") -> Quantized:
    """The codes and scales of an array [rows, K] (float32, float16 or bfloat16).  Raises LlmcError: not finite."""
    rows, k = array.shape
    groups = ceil(k / scheme.group) if scheme.group else 1
    codes = np.empty((rows, k), scheme.numpy_dtype)
    scales = np.empty((rows, groups), np.float16 if scheme.dtype in ("i4", "z4") else np.float32)
    zeros = np.empty_like(scales) if scheme.zeros else None
    step = max(1, _BLOCK_BYTES // (4 * k))
    seek = not scheme.zeros and has_own_scales(array, scheme)

    def some(first: int) -> int:
        block = finite(array[first : first + step].astype(np.float32), name)
        if zeros is not None:
            place = slice(first, first + step)
            codes[place], scales[place], zeros[place], n_kept = fit_groups_with_zeros(block, scheme)
            return n_kept
        if scheme.number == "mx":
            codes[first : first + step], scales[first : first + step], n_kept = fit_powers(block, scheme.group)
            return n_kept
        fit = fit_groups if scheme.group else fit_rows
        codes[first : first + step], scales[first : first + step], n_kept = fit(block, scheme, seek)
        return n_kept

    with ThreadPoolExecutor(_WORKERS) as pool:
        n_kept = sum(pool.map(some, range(0, rows, step)))
    return Quantized(codes, scales, scheme, n_kept / max(scales.size, 1), zeros)


def has_own_scales(array: Array, scheme: Scheme) -> bool:
    """Whether some rows of an array [rows, K], of all parts of it, are codes and scales already."""
    if scheme.number == "mx":
        return False
    rows = array[:: max(1, len(array) // SAMPLED_ROWS)][:SAMPLED_ROWS].astype(np.float32)
    if scheme.group:
        rows = rows[:, : rows.shape[1] // scheme.group * scheme.group or None]
        rows = rows.reshape(-1, min(scheme.group, rows.shape[1]))
    return bool(own_scales(rows, 1, scheme.dtype, partial(to_levels, scheme=scheme, low=-128)).any())


def finite(block: Array, name: str) -> Array:
    """The block of the weight `name`.  Raises LlmcError where it holds what is no finite number."""
    if not np.isfinite(block).all():
        raise LlmcError("a weight that is not a finite number cannot be quantised", place=f"weight {name}")
    return block


def fit_rows(block: Array, scheme: Scheme, seek: bool) -> tuple[Array, Array, int]:
    """Codes and scales float32 [rows, 1] of rows [rows, K], a scale for each row; how many are the rows' own.

    seek: whether some may be."""
    scales, are_own = own_or_best_scales(block, 1, scheme, seek)
    codes = round_to_codes(block, scales[:, None], scheme)
    if scheme.dtype == "i8" and are_own.any():
        own = block[are_own] * _inverse(scales[are_own, None])
        codes[are_own] = np.rint(own)  # -128 too
    return codes, scales[:, None], int(are_own.sum())


def fit_groups(block: Array, scheme: Scheme, seek: bool) -> tuple[Array, Array, int]:
    """Codes and scales float16 [rows, groups] of rows [rows, K], a scale for each group; how many are the groups' own.

    Groups lie side by side while they are searched: [group, rows * groups] runs through whole vectors.
    """
    rows, k = block.shape
    columns = in_columns(block, scheme.group)
    scales, are_own = own_or_best_scales(columns, 0, scheme, seek)
    scales = half_scales(scales)
    codes = np.ascontiguousarray(round_to_codes(columns, scales, scheme).T).reshape(rows, -1)[:, :k]
    return codes, scales.astype(np.float16).reshape(rows, -1), int(are_own.sum())


def fit_groups_with_zeros(block: Array, scheme: Scheme) -> tuple[Array, Array, Array, int]:
    """The same with zeros: codes, scales and zeros float16 [rows, groups], and how many are the groups' own."""
    rows, k = block.shape
    found = fit_zeros(in_columns(block, scheme.group))
    codes = np.ascontiguousarray(found.codes.T).reshape(rows, -1)[:, :k]
    return codes, found.scales.reshape(rows, -1), found.zeros.reshape(rows, -1), int(found.are_own.sum())


def in_columns(block: Array, group: int) -> Array:
    """Groups of rows [rows, K] side by side, [group, rows * groups], the last of a row filled up with 0."""
    filled = np.pad(block, ((0, 0), (0, -block.shape[1] % group))) if block.shape[1] % group else block
    return np.ascontiguousarray(filled.reshape(-1, group).T)


def own_or_best_scales(values: Array, axis: int, scheme: Scheme, seek: bool) -> tuple[Array, Array]:
    """The scale of the codes that the values along `axis` are already, if seek and if they are; else the best.  And
    which scales are of the first kind."""
    if not seek:
        return best_scales(values, axis, scheme), np.asarray(~values.any(axis))
    scales = own_scales(values, axis, scheme.dtype, partial(to_levels, scheme=scheme, low=-128))
    lacking = scales == 0
    if lacking.all():
        scales = best_scales(values, axis, scheme)
    elif lacking.any():
        scales[lacking] = best_scales(np.compress(lacking, values, 1 - axis), axis, scheme)
    return scales, np.asarray(~(lacking & values.any(axis)))


def half_scales(scales: Array) -> Array:
    """The nearest scales that float16 has, in float32."""
    largest = float(np.finfo(np.float16).max)
    nearest: Array = np.clip(scales, -largest, largest).astype(np.float16).astype(np.float32)
    return nearest


def best_scales(values: Array, axis: int, scheme: Scheme, importance: Array | None = None) -> Array:
    """For the values along `axis`, the scale among the candidates' that leaves the least squared error.

    importance: what the square of each value's error weighs, as many as values or broadcast to them; all the same when
    None.
    """
    unit = np.float32(2.0 ** np.floor(np.log2(max(float(np.abs(values).max()), 2.0**-126))))
    values = values / unit  # exact, and no square of it overflows
    largest, smallest = values.max(axis), values.min(axis)
    extreme = np.where(largest > -smallest, largest, smallest)
    kept, scales = np.zeros_like(extreme), np.zeros_like(extreme)
    codes, products, weighing = np.empty_like(values), np.empty_like(values), np.empty_like(values)
    for position in EXTREMES[scheme.dtype]:
        np.multiply(values, np.expand_dims(_inverse(extreme / -position), axis), out=codes)
        to_levels(codes, scheme)
        weighed = codes if importance is None else np.multiply(codes, importance, out=weighing)
        along = np.multiply(values, weighed, out=products).sum(axis)
        square = np.multiply(codes, weighed, out=products).sum(axis)
        scale = along * _inverse(square)
        better = along * scale > kept
        np.copyto(kept, along * scale, where=better)
        np.copyto(scales, scale, where=better)
    result: Array = scales * unit
    return result


def round_to_codes(values: Array, scales: Array, scheme: Scheme) -> Array:
    """The nearest code of each value, in the codes' dtype; 0 where the scale is."""
    codes = values * _inverse(scales)
    to_levels(codes, scheme)
    return codes.astype(scheme.numpy_dtype)


def to_levels(codes: Array, scheme: Scheme, low: int | None = None) -> None:
    """Round each float32, in place, to the nearest code, ties to even; values beyond the largest code become that.

    low: the least code of int8, which is not -128 unless a weight has it already.
    """
    lowest, highest = LEVELS[scheme.dtype]
    np.clip(codes, low if low and scheme.dtype == "i8" else lowest, highest, out=codes)
    if scheme.number == "int":
        np.rint(codes, out=codes)
        return
    # Beside a number 2**20 times its power of two, float32 has room for three more bits: those of e4m3's mantissa.
    beside = (codes.view(np.int32) & np.int32(0x7F800000)).view(np.float32)
    np.maximum(beside, np.float32(LEAST_NORMAL), out=beside)
    beside *= np.float32(1.5 * 2**20)
    codes += beside
    codes -= beside


def _inverse(values: Array) -> Array:
    """1 / values in float32, 0 where that is no finite number."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / values
    result: Array = np.where(np.isfinite(inverse), inverse, np.float32(0))
    return result

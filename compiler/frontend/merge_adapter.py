"""What an adapter makes of a model's weights.

A weight W [out, in] becomes W + s B A, with A [r, in] and B [out, r]; with magnitudes m [out] (DoRA, Liu et al. 2024,
arXiv:2402.09353) each row of that is scaled to the length that m says.  The sum is made in float32 when the weight is
read, and rounded once, to what the artifact stores: in the certificate's reference, which computes in float32, it is
not rounded at all.  So the reference says what the adapter does beside its model, and the artifact's error has the
rounding of the merge in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.weights import Array, StoredDType, Weight
from llmc.runtime.errors import LlmcError

STRIP = 1024
"""Rows of a weight that are changed at a time."""


class Change(Protocol):
    """What becomes of one weight."""

    def check(self, name: str, dims: tuple[int, ...]) -> None:
        """Refuse a weight of another shape than the change is for."""

    def apply(self, values: Array) -> Array:
        """The changed weight, float32, of the weight, float32; may write to it."""


@dataclass(frozen=True)
class Whole:
    """Another weight in its place."""

    tensor: StoredTensor

    def check(self, name: str, dims: tuple[int, ...]) -> None:
        if self.tensor.dims != dims:
            fact = f"the adapter's {name!r} has shape {list(self.tensor.dims)}, the model's {list(dims)}"
            hint = "an adapter with more tokens than its model: merge it with PEFT first"
            raise LlmcError(fact, place=str(self.tensor.file), hint=hint if len(dims) == 2 else None)

    def apply(self, values: Array) -> Array:
        return self.tensor.read().astype(np.float32, copy=False)


@dataclass(frozen=True)
class LowRank:
    """a [r, in], b [out, r]; scale: of their product.  magnitude: [out] elements, or None.  of_embedding: whether the
    weight is a table of rows to look up.  flips: whether the weight is [in, out], where its shape leaves that open."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None
    of_embedding: bool
    flips: bool

    def check(self, name: str, dims: tuple[int, ...]) -> None:
        n_out, n_in = self.b.dims[0], self.a.dims[1]
        if dims not in ((n_out, n_in), (n_in, n_out)):
            fact = f"the adapter's matrices for {name!r} make {[n_out, n_in]}, the model's has shape {list(dims)}"
            raise LlmcError(fact, place=str(self.a.file), hint="it is for another model")

    def apply(self, values: Array) -> Array:
        a, b = self.a.read().astype(np.float32), self.b.read().astype(np.float32) * np.float32(self.scale)
        is_flipped = values.shape != (len(b), a.shape[1]) or (self.flips and len(b) == a.shape[1])
        rows = values.T if is_flipped else values
        for start in range(0, len(rows), STRIP):
            rows[start : start + STRIP] += b[start : start + STRIP] @ a
        if self.magnitude is not None:
            wanted = self.magnitude.read().astype(np.float32).reshape(-1)
            for start in range(0, len(rows), STRIP):
                strip = rows[start : start + STRIP]
                strip *= (wanted[start : start + STRIP] / np.linalg.norm(strip, axis=1))[:, None]
        return values


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A checkpoint's tensor after some changes, one after another; float32 when it is read."""

    base: StoredTensor
    changes: tuple[Change, ...]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.base.parts

    @property
    def stored_dtype(self) -> StoredDType:
        return self.base.stored_dtype

    def read(self) -> Array:
        return _applied(self.base.read(), self.changes)


def merged_weight(weight: Weight, changes: Sequence[Change]) -> Weight:
    """The weight after the changes; of the same stored dtype, and float32 until it is stored."""
    changes = tuple(changes)
    return Weight(weight.name or "", weight.dims, lambda: _applied(weight.unrounded(), changes), weight.stored_dtype)


def _applied(values: Array, changes: Sequence[Change]) -> Array:
    values = np.array(values, np.float32)
    for change in changes:
        values = change.apply(values)
    return values

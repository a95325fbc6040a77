"""How a constant of a model with random weights is made of what is drawn, found out by watching it being read.

A pass leaves a weight as a function; this asks that function once, keeps a list of what it draws, and looks which of a
few recipes gives the same bytes.  What is drawn from nothing (a table of positions) is carried as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmc.compiler.frontend import random_weights
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.compiler.weights import Array, FoldedNorm
from llmc.runtime.errors import LlmcError

LARGEST_TABLE = 32 << 20
Drawn = list[tuple[str, tuple[int, ...], Array]]


@contextmanager
def watched() -> Iterator[Drawn]:
    """What random weights are drawn meanwhile."""
    drawn: Drawn = []
    original = random_weights._draw

    def draw(name: str, dims: tuple[int, ...], *rest: Any) -> Array:
        values = original(name, dims, *rest)
        drawn.append((name, dims, values))
        return values

    random_weights._draw = draw  # type: ignore[assignment]
    try:
        yield drawn
    finally:
        random_weights._draw = original


def recipe_of(name: str, tensor: Any, tables: dict[str, Array]) -> dict[str, Any]:
    """How the constant is made; computed ones go to `tables`.  Raises LlmcError for what no recipe makes."""
    if isinstance(tensor, QuantizedWeight):
        return {"kind": "codes"}
    if isinstance(tensor, FoldedNorm):
        return folded_recipe(name, tensor, tables)
    with watched() as drawn:
        values = tensor.stored() if hasattr(tensor, "stored") else tensor.numpy()
    parts = [[name, list(shape)] for name, shape, _ in drawn]
    if not drawn:
        if values.nbytes > LARGEST_TABLE:
            raise LlmcError(f"a computed constant of {values.nbytes >> 20} MiB is too large to carry", place=name)
        tables[name] = values if values.dtype.itemsize != 2 else values.view(np.float16)
        return {"kind": "table", "name": name}
    arrays = [array for _, _, array in drawn]
    if same_concatenated(arrays, values):
        return {"kind": "parts", "parts": parts}
    if len(arrays) == 1 and (start := first_row(arrays[0], values)) is not None:
        return {"kind": "rows", "parts": parts, "start": start, "stop": start + len(values)}
    raise LlmcError("the constant is made of others in a way that the kit does not know", place=name)


def folded_recipe(name: str, tensor: FoldedNorm, tables: dict[str, Array]) -> dict[str, Any]:
    """Beside codes that mean nothing, zeros are as good."""
    if isinstance(tensor.parts[0], QuantizedWeight):
        return {"kind": "zeros", "shape": list(tensor.dims)}
    parts = [part for part in tensor.parts if part is not None]
    return {"kind": "folded", "of": [recipe_of(f"{name}.{i}", part, tables) for i, part in enumerate(parts)]}


def same_concatenated(parts: list[Array], values: Array) -> bool:
    """Whether the parts one after the other are these values; compared part by part, to hold no second copy."""
    if sum(len(part) for part in parts) != len(values) or any(p.shape[1:] != values.shape[1:] for p in parts):
        return False
    start = 0
    for part in parts:
        if not np.array_equal(raw_bits(part), raw_bits(values[start : start + len(part)])):
            return False
        start += len(part)
    return True


def first_row(source: Array, values: Array) -> int | None:
    """Where in the source these rows begin."""
    if source.shape[1:] != values.shape[1:]:
        return None
    for start in range(len(source) - len(values) + 1):
        if np.array_equal(raw_bits(source[start]), raw_bits(values[0])):
            same = np.array_equal(raw_bits(source[start : start + len(values)]), raw_bits(values))
            return start if same else None
    return None


def raw_bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(np.uint16 if array.dtype.itemsize == 2 else array.dtype)

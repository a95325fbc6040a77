"""Rows of numbers that stand for tokens, in place of their embeddings: the caller's own, or those of a picture."""

from __future__ import annotations

import ctypes as c
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.runtime import capi
from llmc.runtime.errors import LlmcError
from llmc.runtime.runner import Held

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.info import Info

Floats = npt.NDArray[np.float32]
SQUARES = 8
"""Of the example tile, along each side."""
EXAMPLE_ROWS = 6, 9
"""Lines and columns of the rows of the example picture, where pictures are of any size."""


class Given(Held):
    """Rows that a model keeps; made by Model.rows and Model.image.  A context manager; `close` gives them back,
    and sequences that have read them go on.

    ids: their numbers, which sequences take as they take tokens, for as long as this object is there and open.  No
    other rows of this model ever have the same.
    """

    def __init__(self, model: Model, first: int, n: int) -> None:
        self.model, self.ids = model, range(first, first + n)
        super().__init__()

    def numbers(self) -> Floats:
        """float32 [n, n_row]: the rows themselves (a copy)."""
        out, n = capi.Floats(), c.c_size_t()
        with self.model.running() as (api, handle):
            self.model.check(api.rows_numbers(handle, self.ids.start, out, n))
            return np.ctypeslib.as_array(out, (n.value, self.model.info.n_row)).copy()

    def _give_back(self) -> None:
        self.model.forget(self.ids.start)


def rows(model: Model, numbers: npt.ArrayLike, grid: tuple[int, int] | None = None) -> Given:
    """See Model.rows."""
    array, first = np.ascontiguousarray(numbers, np.float32), c.c_int32()
    n_row = model.info.n_row
    with model.running() as (api, handle):
        capi.check_has(api, "rows_new", "take rows in the place of tokens", str(model.path))
        if n_row and (array.ndim != 2 or array.shape[1] != n_row):
            fact = f"rows are an array [n, {n_row}], not {list(array.shape)}"
            raise LlmcError(fact, place=str(model.path))
        if grid is None:
            model.check(api.rows_new(handle, array.ctypes.data, len(array), first))
        else:
            capi.check_has(api, "rows_in_grid", "take rows in lines and columns", str(model.path))
            if min(grid) < 1 or prod(grid) != len(array):
                fact = f"{len(array)} rows do not lie in {grid[0]} lines of {grid[1]} columns"
                raise LlmcError(fact, place=str(model.path))
            model.check(api.rows_in_grid(handle, array.ctypes.data, *grid, first))
        return Given(model, first.value, len(array))


def image(model: Model, pixels: npt.ArrayLike) -> Given:
    """See Model.image."""
    array, first, n = np.ascontiguousarray(pixels, np.float32), c.c_int32(), c.c_size_t()
    tile = model.info.tile
    with model.running() as (api, handle):
        capi.check_has(api, "image_rows", "take pictures", str(model.path))
        if any(tile) and array.shape != tile:
            fact = f"a tile of a picture is an array {list(tile)}, not {list(array.shape)}"
            raise LlmcError(fact, place=str(model.path), hint="it is what the model's own processor makes")
        with model.recording_tile(model.info.n_tile_rows):
            model.check(api.image_rows(handle, array.ctypes.data, first, n))
        return Given(model, first.value, n.value)


def picture(model: Model, patches: npt.ArrayLike, grid: tuple[int, int]) -> Given:
    """See Model.picture."""
    array, first, n = np.ascontiguousarray(patches, np.float32), c.c_int32(), c.c_size_t()
    info = model.info
    with model.running() as (api, handle):
        capi.check_has(api, "picture_rows", "take pictures of any size", str(model.path))
        if info.patch and (min(grid) < 1 or array.shape != (prod(grid), info.patch)):
            lines, columns = grid
            fact = f"a picture of {lines} by {columns} patches is not an array {list(array.shape)}"
            hint = f"patches are {info.patch} numbers each, as the model's own processor makes them"
            raise LlmcError(fact, place=str(model.path), hint=hint)
        with model.recording_tile(prod(grid) // max(info.merge**2, 1)):
            model.check(api.picture_rows(handle, array.ctypes.data, *grid, first, n))
        return Given(model, first.value, n.value)


class Example(NamedTuple):
    """What certificates are made with.  pixels: of a tile, or float32 [lines * columns, patch] of the patches of a
    picture.  grid: (lines, columns); None: it is a tile."""

    pixels: Floats
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, info: Info) -> Example:
        """For a model's tower.  The same numbers on every machine."""
        if not info.patch:
            return cls(example_tile(info.tile))
        lines, columns = (rows * info.merge for rows in EXAMPLE_ROWS)
        rng = np.random.default_rng(2026)
        patches = rng.random((lines * columns, 1), np.float32), rng.random((lines * columns, info.patch), np.float32)
        return cls(np.asarray(1.5 * patches[0] + 0.5 * patches[1] - 1.0, np.float32), (lines, columns))

    def seen(self, model: Model) -> Given:
        """The rows that a model makes of it."""
        return model.image(self.pixels) if self.grid is None else model.picture(self.pixels, self.grid)


def example_tile(shape: tuple[int, int, int]) -> Floats:
    """The tile [channels, height, width] that certificates are made with: squares of all colours under a fine noise, of
    the size that processors give to what they see.  The same numbers on every machine."""
    rng = np.random.default_rng(2026)
    channels, height, width = shape
    squares = rng.random((channels, SQUARES, SQUARES), np.float32)
    rows, columns = np.arange(height) * SQUARES // height, np.arange(width) * SQUARES // width
    noise = rng.random(shape, np.float32)
    return np.asarray(1.5 * squares[:, rows[:, None], columns] + 0.5 * noise - 1.0, np.float32)

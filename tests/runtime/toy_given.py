"""The toy model with rows that may stand for its tokens, and a tower that makes three of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmc.runtime import format as fmt
from tests.runtime import toy_artifact as toy

TILE, TILE_ROWS = (3, 2, 4), toy.SIZES["TILE_ROWS"]
TOWER = fmt.PLAN_KINDS.index("tower")
Floats = npt.NDArray[np.float32]


class GivenPlan(toy.ToyPlan):
    """The toy's plan, of the format whose tokens may be rows of numbers; tile: zeros, and there is no tower;
    picture_rows: of those that see each other.  is_turned: positions have three directions, which are added to x."""

    def __init__(self, tile: tuple[int, int, int] = TILE, picture_rows: int = 0, *, is_turned: bool = False) -> None:
        self.sees, self.is_turned = picture_rows > 0, is_turned
        super().__init__()
        self.header = self.header._replace(n_row=toy.CHANNELS, tile=tile, picture_rows=picture_rows)
        self.header = self.header._replace(is_turned=is_turned)
        if any(tile):
            self.add_plan(TOWER, TILE_ROWS, self.tower_calls())

    def body_calls(self, m: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        row, calls = 4 * toy.CHANNELS, super().body_calls(m)
        calls.insert(1, (f"take_{m}", m, [("is_given", 0, 4 * m), ("given", 0, m * row), ("arena", 0, m * row)]))
        if self.sees:
            x = ("arena", 0, m * row)
            calls.insert(2, (f"peek_{m}", m, [("positions", 0, 4 * m), ("sees", 0, 4 * m), x]))
        if self.is_turned:
            calls.insert(2, (f"shift_{m}", m, [("turns", 0, 12 * m), ("arena", 0, m * row)]))
        return calls

    def tower_calls(self) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        n_bytes = TILE_ROWS * 4 * toy.CHANNELS
        x, pixels = ("arena", self.half, n_bytes), ("pixels", 0, 4 * prod(TILE))
        look = [pixels, ("weights", 0, 4 * toy.CHANNELS), ("scratch", 0, 4 * toy.CHANNELS), x]
        return [("look", TILE_ROWS, look), ("made", 1, [x, ("made", 0, n_bytes)])]


def build_artifact(folder: Path, plan: GivenPlan, **sections: bytes) -> Path:
    """A whole artifact, which can be loaded; the code lies beside it.  sections: more of them, or others."""
    return pack(folder, plan, build_code(folder, plan), **sections)


def build_code(folder: Path, plan: GivenPlan, *flags: str) -> bytes:
    """Its ELF image."""
    sources = [*toy.toy_sources(folder, plan=plan), toy.HERE / "toy_given_kernels.c"]
    return toy.link_c(folder / "code.so", sources, "-O2", "-shared", *flags).read_bytes()


def pack(folder: Path, plan: GivenPlan, code: bytes, **sections: bytes) -> Path:
    path = folder / "given.so"
    path.write_bytes(toy.pack_sections(toy.toy_sections(code, plan=plan.pack(), **sections)))
    return path


def tower(pixels: Floats) -> Floats:
    """Rows [TILE_ROWS, CHANNELS] of a tile [3, 2, 4]."""
    n = TILE_ROWS * toy.CHANNELS
    values = np.resize(pixels.ravel(), n) * np.resize(np.array(toy.TABLE[0], np.float32), n) + np.arange(n)
    rows: Floats = np.fmod(values, np.float32(toy.PRIME)).astype(np.float32).reshape(TILE_ROWS, -1)
    return rows[::-1]


def oracle(text: Sequence[int | Floats]) -> list[list[int]]:
    """Logits after each token, or row [CHANNELS] that stands for one."""
    return toy.oracle_of([toy.TABLE[each] if isinstance(each, int) else each.astype(int).tolist() for each in text])


def turned(row: int | Floats, turns: Sequence[int]) -> Floats:
    """A token, or a row [CHANNELS] that stands for one, as it is where positions have three directions."""
    x = np.array(toy.TABLE[row], np.float32) if isinstance(row, int) else row
    moved: Floats = np.fmod(x + np.resize(np.array(turns, np.float32), len(x)), np.float32(toy.PRIME))
    return moved


def seeing(picture: Floats) -> list[Floats]:
    """The rows [n, CHANNELS] of a picture that see each other, as they are when they have."""
    return [*(np.fmod(row + picture[-1], np.float32(toy.PRIME)) for row in picture[:-1]), picture[-1]]

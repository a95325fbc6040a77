"""An artifact whose weights are made where it is run: everything but them is carried, they are drawn from a seed.

A model's folder in the kit: model.json (where each constant lies and how it is made, the configuration),
sections.zip (all sections but the weights), tables.npz (constants that are computed: positions).  What is drawn is what
`llmc compile --weights random` draws, bit for bit, so Hugging Face can be given the same numbers under its own names.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import zipfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.bench.gpu import bits
from llmc.bench.gpu.bits import Array, Codes, bits_of
from llmc.bench.gpu.kit import LAYOUTS
from llmc.compiler.fold_norm import fold_norm
from llmc.runtime import format as fmt
from llmc.schedules.cuda.tile_layout import TILE

POOL_SIZE, LONGEST_WINDOW = 1 << 22, 1 << 16
"""The same as in compiler/frontend/random_weights.py."""
ORDER = ("code", "weights", "plan", "cuda", "vocabulary", "tokenizer", "graph", "manifest")


class Model:
    """A model's folder in the kit."""

    def __init__(self, folder: Path) -> None:
        self.said: dict[str, Any] = json.loads((folder / "model.json").read_text())
        self.folder, self.name = folder, folder.name

    @cached_property
    def tables(self) -> Mapping[str, Array]:
        return dict(np.load(self.folder / "tables.npz"))

    def draw(self, name: str, shape: tuple[int, ...]) -> Array:
        """A weight of the checkpoint that is made up: its bits (bf16 under the name of float16)."""
        said = self.said
        return draw(name, shape, said["dtype"], said["std"], said["seed"])

    def drawn_name(self, name: str) -> str | None:
        """What a parameter is drawn as: tied ones under their first name."""
        found: str | None = self.said["names"].get(name)
        return found

    @cached_property
    def digest(self) -> str:
        """A hash of everything that makes the artifact what it is: another one must not be taken for it."""
        found = hashlib.sha256()
        for name in ("model.json", "sections.zip", "tables.npz"):
            found.update((self.folder / name).read_bytes())
        return found.hexdigest()[:12]

    def write(self, path: Path, processes: int = 1) -> int:
        """The artifact, whole; its size.  The weights' hash is left out: nobody checks it who opens a file."""
        with zipfile.ZipFile(self.folder / "sections.zip") as carried, path.open("wb") as file:
            sections = []
            for name in ORDER:
                if name != "weights" and name not in carried.namelist():
                    continue
                alignment = fmt.WEIGHTS_ALIGNMENT if name == "weights" else fmt.SECTION_ALIGNMENT
                file.write(bytes(-file.tell() % alignment))
                start, digest = file.tell(), bytes(32)
                if name == "weights":
                    file.truncate(start + self.said["weight_bytes"])
                    self._write_weights(path, start, processes)
                    file.seek(0, 2)
                else:
                    data = carried.read(name)
                    digest = hashlib.sha256(data).digest()
                    file.write(data)
                sections.append(fmt.Section(name, start, file.tell() - start, digest))
            finish(file, sections)
            return file.tell()

    def _write_weights(self, path: Path, start: int, processes: int) -> None:
        """Each constant at its place; the largest first, so that processes end together."""
        weights = sorted(self.said["weights"], key=lambda weight: -int(weight["bytes"]))
        place = partial(self.place, path, start)
        if processes == 1:
            for weight in weights:
                place(weight)
            return
        for mean in (0.0, 1.0):  # drawn once, before there are several
            pool(self.said["dtype"], mean, self.said["std"])
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as executor:
            list(executor.map(place, weights))

    def place(self, path: Path, start: int, weight: Mapping[str, Any]) -> None:
        """Write one constant into the file, whose weights begin at `start`."""
        data = self.pack(weight)
        with path.open("r+b") as file:
            file.seek(start + weight["offset"])
            file.write(data.data)

    def pack(self, weight: Mapping[str, Any]) -> Array:
        layout, recipe = weight["layout"], weight["recipe"]
        if recipe["kind"] == "codes":
            return packed_codes(layout, tuple(weight["shape"]), weight["bytes"])
        made = self.made(recipe)
        if layout["kind"] in LAYOUTS:
            fields = {name: value for name, value in layout.items() if name != "kind"}
            return bits.raw(LAYOUTS[layout["kind"]](**{**fields, "dtype": "f16"}).pack(made))
        if layout["dtype"] == self.stored_as(made) or made.dtype not in (np.float16, np.float32):
            return bits.raw(made)
        return bits.raw(bits_of(self.values(made), layout["dtype"]))

    def stored_as(self, made: Array) -> str:
        return "f32" if made.dtype == np.float32 else str(self.said["dtype"])

    def values(self, made: Array) -> Array:
        return bits.values_of(made, self.stored_as(made))

    def made(self, recipe: Mapping[str, Any]) -> Array:
        """A constant by its recipe (recipes.py): bits."""
        if recipe["kind"] == "zeros":
            return np.zeros(recipe["shape"], np.float32)
        if recipe["kind"] == "folded":
            return fold_norm(*map(self.made, recipe["of"]), widen=self.values)
        if recipe["kind"] == "table":
            return self.tables[recipe["name"]]
        parts = [self.draw(name, tuple(shape)) for name, shape in recipe["parts"]]
        if recipe["kind"] == "rows":
            return np.ascontiguousarray(parts[0][recipe["start"] : recipe["stop"]])
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def finish(file: BinaryIO, sections: list[fmt.Section]) -> None:
    """The directory and the trailer, behind the sections."""
    file.write(bytes(-file.tell() % fmt.SECTION_ALIGNMENT))
    offset = file.tell()
    directory = b"".join(fmt.SECTION.pack(s.name.encode(), s.offset, s.n_bytes, s.sha256) for s in sections)
    size = offset + len(directory) + fmt.TRAILER.size
    digest = hashlib.sha256(directory).digest()
    trailer = fmt.TRAILER.pack(fmt.TRAILER_MAGIC, fmt.FORMAT_VERSION, len(sections), offset, size, digest)
    file.write(directory + trailer)


def packed_codes(layout: Mapping[str, Any], shape: tuple[int, ...], n_bytes: int) -> Array:
    """A quantised weight: 64 rows of random codes over and over, which is enough to see how fast it is read."""
    fields = {name: value for name, value in layout.items() if name not in ("kind", "gated")}
    group = int(fields.get("group", 0))
    generator = np.random.default_rng(0)
    codes = generator.integers(-7, 8, (TILE, shape[1]), np.int8)
    if layout["kind"] == "Fp8Strips":  # of which the bits of -1 would be no number
        codes = bits.e4m3_of(codes.astype(np.float32))
    groups = -(-shape[1] // group) if group else 1
    scales = np.full((TILE, groups), 0.25 * shape[1] ** -0.5, np.float16 if group else np.float32)
    block = LAYOUTS[layout["kind"]](**fields).pack(Codes(codes, scales, group))
    n_scales = 0 if group else TILE * 4
    n_blocks = n_bytes // len(block)
    pieces = np.tile(block[: len(block) - n_scales], n_blocks)
    return np.concatenate([pieces, np.tile(block[len(block) - n_scales :], n_blocks)]) if n_scales else pieces


def draw(name: str, shape: tuple[int, ...], dtype: str, std: float, seed: int) -> Array:
    """Windows into a pool of normal numbers; as compiler/frontend/random_weights.py draws them."""
    size, window = prod(shape), window_of(shape)
    numbers_drawn = pool(dtype, mean_of(name, shape), std)
    values = np.empty(size, numbers_drawn.dtype)
    starts = range(0, size, window)
    for start, offset in zip(starts, offsets(name, shape, seed, len(starts)), strict=True):
        stop = min(start + window, size)
        values[start:stop] = numbers_drawn[offset : offset + stop - start]
    return values.reshape(shape)


def mean_of(name: str, shape: tuple[int, ...]) -> float:
    return 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0


def window_of(shape: tuple[int, ...]) -> int:
    return min(shape[-1], LONGEST_WINDOW) if shape else 1


def offsets(name: str, shape: tuple[int, ...], seed: int, n: int) -> list[int]:
    """Where in the pool a weight's n windows begin."""
    digest = hashlib.blake2b(f"{seed} {name} {shape}".encode(), digest_size=16).digest()
    first, stride = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    return [(first + row * (stride | 1)) % POOL_SIZE for row in range(n)]


@lru_cache(maxsize=4)
def pool(dtype: str, mean: float, std: float) -> Array:
    generator = np.random.Generator(np.random.SFC64(0))
    normal = generator.standard_normal(POOL_SIZE + LONGEST_WINDOW, dtype=np.float32)
    return bits_of(np.float32(mean) + np.float32(std) * normal, dtype)

"""An artifact whose weights are made where it is run: everything but them is carried, they are drawn from a seed.

A model's folder in the kit: model.json (sections, where each constant lies and how it is made, the configuration),
sections.zip (all sections but the weights), tables.npz (constants that are computed: positions).  What is drawn is what
`llmc compile --weights random` draws, bit for bit, so Hugging Face can be given the same numbers under its own names.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmc.bench.gpu import bits
from llmc.bench.gpu.bits import Array, Codes, bits_of
from llmc.bench.gpu.kit import LAYOUTS
from llmc.runtime import format as fmt
from llmc.schedules.cuda.tile_layout import TILE

POOL_SIZE, LONGEST_WINDOW = 1 << 22, 1 << 16
"""As in compiler/frontend/random_weights.py."""
AT_ONCE = 8
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

    def write(self, path: Path) -> int:
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
                    self._write_weights(file)
                else:
                    data = carried.read(name)
                    digest = hashlib.sha256(data).digest()
                    file.write(data)
                sections.append(fmt.Section(name, start, file.tell() - start, digest))
            finish(file, sections)
            return file.tell()

    def _write_weights(self, file: BinaryIO) -> None:
        start = file.tell()
        for weight, data in self.packed():
            file.write(bytes(start + weight["offset"] - file.tell()))
            file.write(data.data)
        file.write(bytes(max(0, start + self.said["weight_bytes"] - file.tell())))

    def packed(self) -> Iterator[tuple[dict[str, Any], Array]]:
        """Each constant as it lies in the file, in order; a few are made at a time."""
        weights = self.said["weights"]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, len(weights), AT_ONCE):
                some = weights[first : first + AT_ONCE]
                yield from zip(some, pool.map(self.pack, some), strict=True)

    def pack(self, weight: Mapping[str, Any]) -> Array:
        layout, recipe = weight["layout"], weight["recipe"]
        if recipe["kind"] == "codes":
            return packed_codes(layout, tuple(weight["shape"]), weight["bytes"])
        made = self.made(recipe)
        if layout["kind"] in LAYOUTS:
            fields = {name: value for name, value in layout.items() if name != "kind"}
            return bits.raw(LAYOUTS[layout["kind"]](**{**fields, "dtype": "f16"}).pack(made))
        stored = "f32" if made.dtype == np.float32 else self.said["dtype"]
        if layout["dtype"] == stored or made.dtype not in (np.float16, np.float32):
            return bits.raw(made)
        return bits.raw(bits_of(bits.values_of(made, stored), layout["dtype"]))

    def made(self, recipe: Mapping[str, Any]) -> Array:
        """A constant by its recipe (recipes.py): bits."""
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
    groups = -(-shape[1] // group) if group else 1
    scales = np.full((TILE, groups), 0.25 * shape[1] ** -0.5, np.float16 if group else np.float32)
    block = LAYOUTS[layout["kind"]](**fields).pack(Codes(codes, scales, group))
    n_scales = 0 if group else TILE * 4
    n_blocks = n_bytes // len(block)
    pieces = np.tile(block[: len(block) - n_scales], n_blocks)
    return np.concatenate([pieces, np.tile(block[len(block) - n_scales :], n_blocks)]) if n_scales else pieces


def draw(name: str, shape: tuple[int, ...], dtype: str, std: float, seed: int) -> Array:
    """Windows into a pool of normal numbers; as compiler/frontend/random_weights.py draws them."""
    mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    digest = hashlib.blake2b(f"{seed} {name} {shape}".encode(), digest_size=16).digest()
    first, stride = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
    size = prod(shape)
    window = min(shape[-1], LONGEST_WINDOW) if shape else 1
    numbers_drawn = pool(dtype, mean, std)
    values = np.empty(size, numbers_drawn.dtype)
    for row, start in enumerate(range(0, size, window)):
        offset = (first + row * (stride | 1)) % POOL_SIZE
        stop = min(start + window, size)
        values[start:stop] = numbers_drawn[offset : offset + stop - start]
    return values.reshape(shape)


@lru_cache(maxsize=4)
def pool(dtype: str, mean: float, std: float) -> Array:
    generator = np.random.Generator(np.random.SFC64(0))
    normal = generator.standard_normal(POOL_SIZE + LONGEST_WINDOW, dtype=np.float32)
    return bits_of(np.float32(mean) + np.float32(std) * normal, dtype)

"""The tower of a model that takes pictures: the graph that makes rows of embeddings of a tile, and its weights.

A picture is one tile or several, all of one size, as the model's own processor makes them; a tile's rows stand in the
text's embeddings in place of as many tokens.  What the text part is, is said elsewhere (text_part.py): here is the
rest of the whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from llmc.compiler.frontend.bind_weights import checkpoint_weights, random_weights, unread
from llmc.compiler.frontend.checkpoint import StoredTensor, sample
from llmc.compiler.frontend.graph_cache import exported_sized_tower, exported_tower
from llmc.compiler.frontend.processor import LEAVE_OUT, image_token, read_processor
from llmc.compiler.graph.shapes import dims
from llmc.compiler.ops import DEEP, SEES_AHEAD, SIZED, TURNED
from llmc.compiler.weights import StoredDType, Weight
from llmc.runtime.errors import LlmcError
from llmc.runtime.format import MAX_MERGE, Sized
from llmc.runtime.processor import Processor, Section

SIZES = ("image_size", "img_size")
"""What they call the size of a tile: a number, or [H, W]."""
CHANNELS, LARGEST = 3, 4096
MERGE = "spatial_merge_size"
"""What configurations of towers that take pictures of any size say."""
MOST_ROWS, FEWEST_ROWS, LARGEST_ROWS = 1024, 64, 16384
"""Most rows of a picture of any size: by default, which is 0.8 million pixels where a row has 28 by 28; and what may be
asked for."""
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""The files of which one says how a model prepares pictures."""
NO_PROCESSOR = "the model has no processor: it takes pixels that are prepared already, and no pictures"
TRIED = ((48, 48), (90, 1000), (1400, 300), (900, 1200))
"""Height and width of the pictures that a processor is tried with."""


@dataclass(frozen=True)
class Whole:
    """The whole of a model of which another is the text part.  fields: of its config.json.  checkpoint: all tensors;
    None for random weights."""

    fields: dict[str, Any]
    checkpoint: Mapping[str, StoredTensor] | None


@dataclass(frozen=True)
class Tower:
    """What makes rows of embeddings of one tile of a picture.

    graph: float32; `pixels` [3, H, W] -> `made` [n_rows, size].  Its initializers are `Weight`s.
    weights: the same tensors by name, in the checkpoint's own dtype.
    tile: (3, H, W).  n_rows: of a tile.  size: of a row, that of the text's embeddings.
    image_token: what stands for a row in the text that the model's processor makes.  digest: SHA-256 of all that.
    sees_ahead: whether a picture's rows see each other in the text.  is_turned: whether positions in it have three
    directions.  is_deep: whether rows add to the results of the text's first layers, and have so much more for each.
    sized: what a tower is made for that takes pictures of any size; None for others.  Its graph is that of some
    patches (export/sized_tower.py); tile is zeros, and n_rows the most of a picture.
    """

    graph: ir.Model
    weights: Mapping[str, Weight]
    tile: tuple[int, int, int]
    n_rows: int
    size: int
    image_token: int
    digest: str
    sees_ahead: bool = False
    sized: Sized | None = None
    is_turned: bool = False
    is_deep: bool = False

    @property
    def n_places(self) -> int:
        """More than a picture has lines, or columns, of patches."""
        return self.n_rows * self.sized.merge + 1 if self.sized is not None else 0

    @property
    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        if self.sized is not None:
            said = {"patch": self.sized.patch, "merge": self.sized.merge, "most_rows": self.n_rows}
            return {**said, "size": self.size, "image_token": self.image_token}
        return {"tile": list(self.tile), "rows": self.n_rows, "size": self.size, "image_token": self.image_token}


@dataclass(frozen=True)
class Images:
    """How a model takes pictures.

    processor: the section that makes tiles of them (processor.py); None: it has none, and takes tiles alone.
    fields: of the whole model's configuration.  notes: what the user should be told.
    """

    tower: Tower
    processor: bytes | None
    fields: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_images(
    whole: Whole,
    stored: StoredDType,
    folder: Path | None,
    tokenizer_json: bytes | None,
    *,
    place: str,
    std: float,
    seed: int,
    most_rows: int = MOST_ROWS,
) -> Images:
    """How a whole model takes pictures; reads no weight.  std, seed: of random weights.  place: for messages.
    most_rows: of a picture, where they are of any size.

    Raises LlmcError for a model that takes none, of which more would have to be known than rows, or whose processor
    makes something else of pictures than tiles of one size.
    """
    token = image_token(whole.fields, place)
    tower, most_pixels, how = None, 0, {"place": place, "std": std, "seed": seed}
    if (merge := merge_of(whole.fields)) and (side := patch_side(whole.fields, place)):
        tower = load_sized_tower(whole, stored, most_rows, token, **how)  # type: ignore[arg-type]
        most_pixels = most_rows * (merge * side) ** 2
    processor: bytes | None = None
    notes: tuple[str, ...] = (NO_PROCESSOR,)
    if folder is not None and tokenizer_json is not None and any((folder / name).is_file() for name in PROCESSORS):
        processor, notes = read_processor(folder, whole.fields, tokenizer_json, place, most_pixels), ()
    tries = try_processor(processor, tokenizer_json or b"", token, place) if processor else []
    if tower is None:
        tile = tries[0].tile if tries else tile_of(whole.fields, place)
        tower = load_tower(whole, stored, tile, token, **how)  # type: ignore[arg-type]
    for tried in tries:
        tried.check(tower, place)
    return Images(tower, processor, whole.fields, notes)


class Tried(NamedTuple):
    """What the processor made of a picture [height, width].  tile: the shape of one, or of a patch.  n_tiles: or
    patches.  runs: how many tokens that stand for rows are in a row.  grid: of patches; None: they are tiles."""

    picture: tuple[int, int]
    tile: tuple[int, ...]
    n_tiles: int
    runs: tuple[int, ...]
    grid: tuple[int, int] | None

    def check(self, tower: Tower, place: str) -> None:
        high, wide = self.picture
        fact = f"of a picture of {wide} by {high} pixels the model's processor makes"
        if (self.grid is None) != (tower.sized is None):
            said = f"{fact} {'tiles' if self.grid is None else 'patches'}, which its tower does not take"
            raise LlmcError(said, place=place, hint=LEAVE_OUT)
        if tower.sized is not None:
            self.check_patches(tower, tower.sized, fact, place)
            return
        if self.tile != tower.tile:
            said = f"{fact} tiles of {self.tile[-1]} by {self.tile[-2]}, of others {tower.tile[-1]} by {tower.tile[-2]}"
            raise LlmcError(said, place=place, hint=LEAVE_OUT)
        if sum(self.runs) != self.n_tiles * tower.n_rows:
            said = f"{fact} {sum(self.runs)} tokens, and its tower {self.n_tiles} times {tower.n_rows} rows"
            raise LlmcError(said, place=place, hint=LEAVE_OUT)
        if tower.sees_ahead and set(self.runs) != {tower.n_rows}:
            said = f"{fact} rows of several tiles in a row, which would see each other"
            raise LlmcError(said, place=place, hint=LEAVE_OUT)

    def check_patches(self, tower: Tower, sized: Sized, fact: str, place: str) -> None:
        """The same of a picture of any size."""
        lines, columns = self.grid or (0, 0)
        said = f"{fact} {lines} by {columns} patches of {self.tile[-1]} numbers, and {sum(self.runs)} tokens of them"
        fits = self.tile == (sized.patch,) and self.n_tiles == lines * columns
        fits = fits and lines % sized.merge == columns % sized.merge == 0
        if not fits or self.runs != (self.n_tiles // sized.merge**2,):
            said = (
                f"{said}: its tower takes patches of {sized.patch}, and makes a row of {sized.merge} by {sized.merge}"
            )
            raise LlmcError(said, place=place, hint=LEAVE_OUT)
        if sum(self.runs) > tower.n_rows:
            raise LlmcError(f"{said}, more than {tower.n_rows}", place=place, hint="ask for more: --max-image-rows")


def try_processor(section: bytes, tokenizer_json: bytes, token: int, place: str) -> list[Tried]:
    """What the processor makes of pictures of several shapes."""
    from PIL import Image

    prepare = Processor(Section.read(section), tokenizer_json.decode(), place)
    tries = []
    for high, wide in TRIED:
        made = prepare(Image.new("RGB", (wide, high), (200, 30, 90)))
        n_tiles, *tile = made.tiles.shape
        runs = tuple(len(list(run)) for each, run in groupby(made.ids) if each == token)
        tries.append(Tried((high, wide), tuple(tile), n_tiles, runs, made.grid))
    return tries


def load_tower(
    whole: Whole, stored: StoredDType, tile: tuple[int, ...], token: int, *, place: str, std: float, seed: int
) -> Tower:
    """The tower of a whole model, for tiles of this shape; reads no weight."""
    channels, height, width = tile
    graph = exported_tower(whole.fields, (channels, height, width), token, place)
    weights, contents = with_weights(graph, whole, stored, place=place, std=std, seed=seed)
    n_rows, size = (n for n in dims(graph.graph.outputs[0]) if isinstance(n, int))
    said = json.dumps([whole.fields, tile], sort_keys=True).encode()
    digest, sees_ahead = hashlib.sha256(said + contents).hexdigest(), SEES_AHEAD in graph.metadata_props
    return Tower(graph, weights, (channels, height, width), n_rows, size, token, digest, sees_ahead)


def load_sized_tower(
    whole: Whole, stored: StoredDType, most_rows: int, token: int, *, place: str, std: float, seed: int
) -> Tower:
    """The tower of a whole model that takes pictures of any size, of up to most_rows rows; reads no weight."""
    graph = exported_sized_tower(whole.fields, token, place)
    weights, contents = with_weights(graph, whole, stored, place=place, std=std, seed=seed)
    size = dims(graph.graph.outputs[0])[1]
    assert isinstance(size, int)
    sized = Sized(*map(int, graph.metadata_props[SIZED].split()))
    said = json.dumps([whole.fields, most_rows], sort_keys=True).encode()
    digest = hashlib.sha256(said + contents).hexdigest()
    how = {"is_turned": TURNED in graph.metadata_props, "is_deep": DEEP in graph.metadata_props}
    return Tower(graph, weights, (0, 0, 0), most_rows, size, token, digest, sized=sized, **how)


def with_weights(
    graph: ir.Model, whole: Whole, stored: StoredDType, *, place: str, std: float, seed: int
) -> tuple[Mapping[str, Weight], bytes]:
    """The weights of a tower's graph, which then has them as they are to be stored; and a digest of them."""
    if whole.checkpoint is None:
        weights = random_weights(graph, stored, std=std, seed=seed)
        contents = f"random {stored} {std} {seed}".encode()
    else:
        weights = checkpoint_weights(graph, whole.checkpoint, whole.fields, place=place, is_whole=True)
        contents = sample(whole.checkpoint)
    for initializer in unread(graph):
        initializer.const_value = weights[initializer.name or ""].stored_as(stored)
    return weights, contents


def merge_of(fields: Mapping[str, Any]) -> int:
    """How many patches along its side a row is made of, where a tower takes pictures of any size; 0: it takes tiles."""
    vision = fields.get("vision_config")
    said = vision.get(MERGE, 0) if isinstance(vision, dict) else 0
    return said if isinstance(said, int) and 0 < said <= MAX_MERGE else 0


def patch_side(fields: Mapping[str, Any], place: str) -> int:
    """Pixels along a side of a patch."""
    said = fields["vision_config"].get("patch_size")
    if not isinstance(said, int) or not 0 < said <= LARGEST:
        raise LlmcError("its configuration names no size of patches", place=place)
    return said


def tile_of(fields: Mapping[str, Any], place: str) -> tuple[int, int, int]:
    """(3, H, W) of what the tower was made for."""
    vision = fields.get("vision_config")
    said = next((vision[name] for name in SIZES if name in vision), None) if isinstance(vision, dict) else None
    sizes = [said, said] if isinstance(said, int) else said
    if isinstance(sizes, list) and len(sizes) == 2 and all(isinstance(n, int) and 0 < n <= LARGEST for n in sizes):
        return (CHANNELS, sizes[0], sizes[1])
    raise LlmcError("its configuration names no one size of pictures", place=place)

"""A model's own way of making pictures into tiles and tokens: transformers' processor, from an artifact's section.

It runs without PyTorch: pictures are resized and cut by Pillow and NumPy.  What reads videos or sound, which would need
more, is left out.  No code of the files' own is run.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

if TYPE_CHECKING:
    from PIL.Image import Image

Tiles = npt.NDArray[np.float32]

TOKENIZER = "tokenizer.json"
FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""The files of a checkpoint that say how pictures and texts are prepared; the tokenizer is a section of its own."""
MOST_BYTES = 4 << 20
"""Of all these files together."""
GRIDS = "image_grid_thw"
GIVEN = ("pixel_values", GRIDS, "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor may make of a text with pictures; besides, masks that hide nothing."""
TILES_ALONE = "its tower is told of tiles alone"
HOW = {"local_files_only": True, "trust_remote_code": False}
WHOLE_TEXTS = {"add_special_tokens": False, "truncation": False, "padding": False}
"""How a text becomes tokens: as it is, whatever limits its tokenizer was trained with."""
MOST_PIXELS, LEAST_PIXELS = "longest_edge", "shortest_edge"
"""What transformers calls these in the sizes of processors of pictures of any size."""
SILENCE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


class Section(NamedTuple):
    """The section "processor".  name: of transformers' class.  image_token: the id in whose places the model puts rows
    of a picture.  files: by name, of FILES.  mark: the id that stands for a picture in a text.  most_pixels: of a
    picture, which is made smaller; 0: as the files say."""

    name: str
    image_token: int
    files: Mapping[str, str]
    mark: int
    most_pixels: int = 0

    @classmethod
    def read(cls, data: bytes) -> Section:
        """Raises ValueError: it is not one."""
        said = parse_json(data)
        try:
            found = cls(
                said["class"], said["image_token"], dict(said["files"]), said["mark"], said.get("most_pixels", 0)
            )
        except (KeyError, TypeError):
            raise ValueError("fields are missing") from None
        texts = [found.name, *found.files.values()]
        numbers = found.image_token, found.mark, found.most_pixels
        if {*map(type, numbers)} != {int} or not all(isinstance(text, str) for text in texts):
            raise ValueError("fields are of another type")
        if not found.files.keys() <= {*FILES} or sum(map(len, texts)) > MOST_BYTES:
            raise ValueError("there are other files than a processor's")
        return found


class Prepared(NamedTuple):
    """A picture as a prompt has it.  ids: the tokens in its place, with image_token for each row that the model makes
    of it.  tiles: float32 [n, 3, H, W], what it makes them of; or [n, patch], all of its patches.  grid: lines and
    columns of these; None: they are tiles."""

    ids: tuple[int, ...]
    tiles: Tiles
    grid: tuple[int, int] | None = None


class Processor:
    """Prepares pictures.  image_mark: what stands for one in a text.  whole: transformers' own."""

    def __init__(self, section: Section, tokenizer_json: str, place: str) -> None:
        """tokenizer_json: the section "tokenizer".  place: the artifact's, for errors.  Raises LlmcError: transformers
        does not make a processor of this; ModuleNotFoundError: it is not installed, or Pillow is not."""
        import PIL  # noqa: F401  # transformers would speak of it in a traceback's length

        self._place, self.image_token = place, section.image_token
        try:
            self.whole = load(section, tokenizer_json)
            if section.most_pixels:
                shrink(self.whole.image_processor, section.most_pixels)
            self.image_mark = str(self.whole.image_token)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # transformers raises anything at all
            fact = f"transformers cannot make the model's processor {section.name}: {first_line(error)}"
            hint = (
                "it needs transformers as new as that which the artifact was compiled with: pip install -U transformers"
            )
            raise LlmcError(fact, place=place, hint=hint) from error

    def __call__(self, picture: Image) -> Prepared:
        """picture: RGB.  Raises LlmcError: the processor refuses it."""
        return self.prepare(self.image_mark, [picture])

    def prepare(self, text: str, pictures: Sequence[Image]) -> Prepared:
        """All tokens of a text in which each picture has its mark, and the tiles of all.  Raises LlmcError."""
        try:
            with quiet():
                made = self.whole(text=[text], images=[*pictures], return_tensors="np", text_kwargs=WHOLE_TEXTS)
            tiles = np.asarray(made["pixel_values"], np.float32)
            ids = [int(token) for token in np.asarray(made["input_ids"]).reshape(-1)]
        except MemoryError:
            raise
        except Exception as error:
            fact = f"the model's processor refuses the picture: {first_line(error)}"
            raise LlmcError(fact, place=self._place) from error
        more = next((name for name, value in made.items() if name not in GIVEN and not is_full(name, value)), None)
        if more is not None:
            fact = f"the model's processor makes {more!r} of a picture beside tiles"
            raise LlmcError(fact, place=self._place, hint=TILES_ALONE)
        if GRIDS in made:
            (_, lines, columns), *_ = np.asarray(made[GRIDS]).tolist()
            return Prepared(tuple(ids), np.ascontiguousarray(tiles), (int(lines), int(columns)))
        if tiles.ndim < 4:
            raise LlmcError(
                f"the model's processor makes {list(tiles.shape)} of a picture, and no tiles", place=self._place
            )
        return Prepared(tuple(ids), np.ascontiguousarray(tiles.reshape(-1, *tiles.shape[-3:])))


def is_full(name: str, value: object) -> bool:
    """Whether it is a mask that hides no part of a picture."""
    return "mask" in name and bool(np.asarray(value).all())


def shrink(images: Any, most_pixels: int) -> None:
    """Let a processor of pictures of any size make none of more pixels."""
    sizes = dict(images.size)
    if not all(isinstance(sizes.get(name), int) for name in (MOST_PIXELS, LEAST_PIXELS)):
        raise ValueError("it does not say how many pixels a picture may have")
    images.size = type(images.size)(**{name: min(size, most_pixels) for name, size in sizes.items()})


def load(section: Section, tokenizer_json: str) -> Any:
    """The processor, an object of a class of transformers' own."""
    with quiet(), tempfile.TemporaryDirectory(prefix="llmc-") as name:
        folder = Path(name)
        for file, text in {**section.files, TOKENIZER: tokenizer_json}.items():
            (folder / file).write_text(text, encoding="utf-8")
        from transformers import AutoImageProcessor, AutoTokenizer

        kind = class_of(section.name)
        loaders = {
            "tokenizer": lambda: AutoTokenizer.from_pretrained(folder, **HOW),
            "image_processor": lambda: AutoImageProcessor.from_pretrained(folder, backend="pil", **HOW),
        }
        parts = [loaders[part]() if part in loaders else None for part in kind.get_attributes()]
        fields, _ = kind.get_processor_dict(folder, local_files_only=True)
        return kind.from_args_and_dict(parts, fields)


def class_of(name: str) -> Any:
    """Transformers' class of this name, which here may lack a part that reads something else than pictures."""
    from transformers import ProcessorMixin
    from transformers.models.auto.processing_auto import processor_class_from_name

    found = processor_class_from_name(name)
    if not (isinstance(found, type) and issubclass(found, ProcessorMixin)):
        raise ValueError("there is no such class")
    whole: Any = found

    def check(self: Any, part: str, given: object) -> object:
        return type(None) if given is None else whole.check_argument_for_proper_class(self, part, given)

    return type(whole.__name__, (whole,), {"check_argument_for_proper_class": check})


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says to itself: that a machine has no PyTorch, say, which nothing here needs."""
    before, logger = os.environ.get(SILENCE), logging.getLogger("transformers")
    os.environ[SILENCE] = "1"
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[SILENCE]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

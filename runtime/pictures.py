"""Pictures as users give them: files of a few formats, decoded within bounds; or what is decoded already.

A picture may come from anybody.  What it says of its size is looked at before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.read_file import read_file

if TYPE_CHECKING:
    from PIL.Image import Image

Given: TypeAlias = "str | os.PathLike[str] | bytes | Image | npt.NDArray[np.uint8] | Picture"
"""A path, a file's bytes, a picture of Pillow's, or uint8 [H, W, 3]."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Of those that Pillow reads: what pictures are in, and no format of documents, which may run other programs."""
MOST_BYTES = 64 << 20
"""Of a file."""
MOST_PIXELS = 1 << 26
"""Of a picture, which may be a file of a few kilobytes."""
MOST_RATIO = 200
"""Of a picture's sides: processors bring the shorter one to their size, and the longer one grows with it."""
IS_PICTURE = f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


@dataclass(frozen=True, eq=False)
class Picture:
    """data: a file's bytes; None where it is decoded already.  place: the file, or which picture, for errors."""

    data: bytes | None = field(repr=False)
    place: str | None = None
    image: Image | None = field(default=None, repr=False)

    @classmethod
    def of(cls, given: Given, place: str | None = None) -> Picture:
        """Raises LlmcError: no such file, or nothing that could be a picture; ModuleNotFoundError: no Pillow."""
        if isinstance(given, Picture):
            return given
        if isinstance(given, bytes):
            return cls(given, place)
        if isinstance(given, str | os.PathLike):
            return cls(read_picture(given), str(given))
        import PIL.Image

        if isinstance(given, PIL.Image.Image):
            return cls(None, place, given)
        if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.ndim == 3 and given.shape[2] == 3:
            return cls(None, place, PIL.Image.fromarray(given))
        hint = "a path, bytes, a picture of Pillow's, or uint8 [H, W, 3]"
        raise LlmcError(f"a {type(given).__name__} is no picture", place=place, hint=hint)

    @property
    def n_bytes(self) -> int:
        """About what it takes of memory until it is decoded."""
        return len(self.data) if self.data is not None else 0

    def digest(self) -> bytes:
        """The same for the same file; of one that is decoded already, for the same in RGB, as its own numbers may mean
        other colours to another one's palette.  Raises as `decode`."""
        if self.data is not None:
            return hashlib.sha256(self.data).digest()
        seen = self.decode()
        return hashlib.sha256(f"{seen.size}".encode() + seen.tobytes()).digest()

    def decode(self) -> Image:
        """In RGB, upright, on white where it is transparent.  Raises LlmcError; ModuleNotFoundError: no Pillow."""
        image = self.image if self.data is None else opened(self.data, self.place)
        assert image is not None
        check_size(image.size, self.place)
        if is_animation(image, self.place):
            raise LlmcError("the picture is an animation", place=self.place, hint="give one picture of it")
        return in_rgb(image, self.place)


def pictures_of(given: Sequence[Given]) -> list[Picture]:
    """Raises LlmcError: one is none; ModuleNotFoundError: no Pillow."""
    if isinstance(given, str | bytes | os.PathLike):
        raise LlmcError("images is one picture, and not a list of some", hint="images=[picture]")
    return [Picture.of(each, f"picture {number}") for number, each in enumerate(given, 1)]


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file.  Raises LlmcError: there is none, or it is too large."""
    place = shortened(os.fspath(path), 200)
    try:
        data = read_file(path, MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "download it first" if str(path).startswith(("http://", "https://")) else None
        raise LlmcError(f"the picture cannot be read: {reason}", place=place, hint=hint) from None
    if len(data) > MOST_BYTES:
        raise LlmcError(f"the picture has more than {MOST_BYTES >> 20} MiB", place=place)
    return data


def opened(data: bytes, place: str | None) -> Image:
    """Pillow's picture of a file, of which no more than the first bytes are looked at."""
    import PIL.Image

    try:
        return PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_large(place) from None
    except Exception:  # Pillow raises many kinds, for what is no picture and for one that is damaged
        raise LlmcError("this is no picture, or a damaged one", place=place, hint=IS_PICTURE) from None


def check_size(size: tuple[int, int], place: str | None) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise LlmcError(f"the picture has {width} × {height} pixels", place=place)
    if width * height > MOST_PIXELS:
        raise too_large(place)
    if max(size) > MOST_RATIO * min(size):
        fact = f"the picture has {width} × {height} pixels: one side is more than {MOST_RATIO} times the other"
        raise LlmcError(fact, place=place, hint="cut it into several")


def is_animation(image: Image, place: str | None) -> bool:
    """Looks no further than at a second picture.  A camera's several (MPO) are none: its first one is what it shows."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # of what stands there
        raise damaged(place) from None


def too_large(place: str | None) -> LlmcError:
    return LlmcError(
        f"the picture has more than {MOST_PIXELS // 10**6} million pixels", place=place, hint="make it smaller"
    )


def in_rgb(image: Image, place: str | None) -> Image:
    """The picture in RGB: turned as its camera says, transparency over white, 16 bits a sample cut to 8."""
    from PIL import Image as images

    try:
        image.load()
        upright = turned(image)
        if upright.mode.startswith("I;16"):  # Pillow's own conversion makes white of what is over 255
            return images.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
        if "A" not in upright.getbands() and "transparency" not in upright.info:
            return upright.convert("RGB")
        seen = upright.convert("RGBA")
        return images.alpha_composite(images.new("RGBA", seen.size, (255, 255, 255, 255)), seen).convert("RGB")
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception:
        raise damaged(place) from None


def turned(image: Image) -> Image:
    """The picture as its camera says; as it is where what that said is damaged, which is no part of the picture."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error):  # of which Pillow itself heeds some, by format
        return image


def damaged(place: str | None) -> LlmcError:
    return LlmcError("the picture is damaged, or cut short", place=place, hint=IS_PICTURE)

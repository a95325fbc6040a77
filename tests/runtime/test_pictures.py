"""Pictures as users give them: every format, hostile ones, and each way of naming one."""

from __future__ import annotations

import io
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmc.runtime import pictures
from llmc.runtime.errors import LlmcError
from llmc.runtime.pictures import Picture, pictures_of
from tests.pictured import noise


def saved(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def refusal(given: object) -> str:
    with pytest.raises(LlmcError) as caught:
        Picture.of(given, "here").decode()  # type: ignore[arg-type]
    assert caught.value.place
    return caught.value.fact


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Picture.of(data).decode())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_formats_of_pictures_are_read(kind: str) -> None:
    decoded = Picture.of(saved(noise(), kind)).decode()
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))
    if kind in ("PNG", "BMP"):
        assert np.array_equal(np.asarray(decoded), np.asarray(noise()))


def test_a_file_bytes_a_picture_and_an_array_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(saved(noise()))
    for given in (path, str(path), path.read_bytes(), noise(), np.asarray(noise())):
        [picture] = pictures_of([given])
        assert np.array_equal(np.asarray(picture.decode()), np.asarray(noise()))
    assert Picture.of(path).digest() == Picture.of(path.read_bytes()).digest() != Picture.of(noise()).digest()
    assert Picture.of(noise()).digest() == Picture.of(np.asarray(noise())).digest()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 7), (7, 7, 7)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 0)), (255, 255, 255)),  # what is not seen is not its colour
        (Image.new("LA", (4, 4), (0, 255)), (0, 0, 0)),
        (Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), (0x80, 0x80, 0x80)),
    ],
    ids=["grey", "bits", "transparent", "grey with alpha", "16 bits"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert (pixels(saved(image)) == expected).all()


def test_cmyk_becomes_rgb() -> None:
    assert np.abs(pixels(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")) - [255, 0, 0]).max() < 9


def test_a_palette_with_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(saved(image, transparency=1)) == 255).all()


def test_what_looks_different_is_another_picture() -> None:
    """However alike its numbers are: a palette says what they mean, and a camera which side is up."""
    red, blue = Image.new("P", (4, 2), 0), Image.new("P", (4, 2), 0)
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert Picture.of(red).digest() != Picture.of(blue).digest()
    assert Picture.of(red).digest() == Picture.of(red.convert("RGB")).digest()
    turned = noise()
    turned.getexif()[0x0112] = 3
    assert Picture.of(turned).digest() != Picture.of(noise()).digest()


def test_a_camera_says_which_side_is_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right
    turned = pixels(saved(noise(), "JPEG", exif=exif, quality=95))
    plain = pixels(saved(noise(), "JPEG", quality=95))
    assert np.array_equal(turned, np.rot90(plain, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_a_camera_says_may_be_damaged(kind: str) -> None:
    assert Picture.of(saved(noise(), kind, exif=b"Exif\0\0not what it says")).decode().size == (40, 30)


def test_an_animation_is_refused() -> None:
    for kind in ("GIF", "WEBP", "PNG"):
        data = saved(noise(), kind, save_all=True, append_images=[noise(seed=1)])
        assert refusal(data) == "the picture is an animation"


def test_an_animation_of_very_many_is_not_counted() -> None:
    data = saved(noise(4, 4), "GIF", save_all=True, append_images=[noise(4, 4, seed=1)])
    frame = data[data.rindex(b"!\xf9") : -1]
    began = time.process_time()
    assert refusal(data[:-1] + 100_000 * frame + b";") == "the picture is an animation"
    assert time.process_time() - began < 0.5


def test_of_a_cameras_several_pictures_the_first_is_taken() -> None:
    data = saved(noise(), "MPO", save_all=True, append_images=[noise(20, 20, seed=1)])
    assert pixels(data).shape == (30, 40, 3)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has such a size, and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (13000, 10000), (100000, 100000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    assert refusal(png_of(width, height)) == "the picture has more than 67 million pixels"


def test_a_thread_is_refused_which_a_processor_would_make_endless() -> None:
    assert "one side is more than 200 times the other" in refusal(png_of(30000, 1))


def test_no_picture_is_refused(tmp_path: Path) -> None:
    png, jpeg = saved(noise()), saved(noise(), "JPEG")
    for data in (b"", b"abc", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", saved(noise(), "TIFF"), png_of(0, 0)):
        assert refusal(data) in ("this is no picture, or a damaged one", "the picture has 0 × 0 pixels")
    for data in (png[: len(png) // 2], jpeg[: len(jpeg) // 2], png_of(40, 30)):
        assert refusal(data) == "the picture is damaged, or cut short"
    assert refusal(tmp_path / "none.png") == "the picture cannot be read: No such file or directory"
    assert refusal(tmp_path) == "the picture cannot be read: Is a directory"
    assert refusal(5) == "a int is no picture"
    assert refusal(np.zeros((4, 4, 3), np.float32)) == "a ndarray is no picture"


def test_a_url_is_not_fetched() -> None:
    with pytest.raises(LlmcError, match="cannot be read") as caught:
        Picture.of("https://example.com/cat.png")
    assert caught.value.hint == "download it first"


def test_a_large_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    path = tmp_path / "large.png"
    path.write_bytes(bytes((1 << 20) + 1))
    assert refusal(path) == "the picture has more than 1 MiB"


def test_one_picture_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="not a list"):
        pictures_of(str(tmp_path / "picture.png"))


@pytest.mark.parametrize("kind", pictures.FORMATS)
def test_damaged_files_give_a_picture_or_one_error(kind: str) -> None:
    whole = saved(noise(9, 7), kind)
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        data = bytearray(whole)
        data[place] ^= 0x55
        with suppress(LlmcError):
            assert Picture.of(bytes(data)).decode().mode == "RGB"

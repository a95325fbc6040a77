"""Pictures in requests, in the forms of OpenAI's and Anthropic's APIs: their bytes, in base64; nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from llmc.runtime.pictures import Picture
from llmc.runtime.serve.fields import ApiError, wrong

DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
SEND_DATA = "this server fetches nothing: send the picture itself, in base64"
MOST_PICTURES = 100
"""Of a request: as many as Anthropic takes."""


def read_picture_part(place: str, part: object) -> Picture | None:
    """The picture of a part; None: it is of another kind.  Raises ApiError: it has none that can be had.

    {"type": "image_url", "image_url": {"url": …}}, OpenAI's in chats; {"type": "input_image", "image_url": …}, its in
    responses; {"type": "image", "source": {"type": "base64", "data": …}}, Anthropic's.  What they say of its quality
    and its format is not looked at: a model has one way of reading pictures, and these say what they are.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("image_url", "input_image", "image"):
        return None
    if kind == "image":
        return of_source(f"{place}.source", part.get("source"))
    if part.get("file_id") is not None:
        raise wrong(f"{place}.file_id", "is not had: files are not stored; send the picture as 'image_url'")
    given, where = part.get("image_url"), f"{place}.image_url"
    if isinstance(given, dict):
        given, where = given.get("url"), f"{where}.url"
    return of_url(where, given)


def of_url(place: str, url: object) -> Picture:
    if not isinstance(url, str):
        raise wrong(place, "must be a text: data:image/png;base64,…")
    head = DATA_URL.match(url)
    if head is None:
        raise wrong(place, f"is no data: URL in base64; {SEND_DATA}")
    return of_base64(place, url[head.end() :])


def of_source(place: str, source: object) -> Picture:
    said: Mapping[str, Any] = source if isinstance(source, dict) else {}
    if said.get("type") != "base64":
        raise wrong(place, f'must be {{"type": "base64", "media_type": …, "data": …}}; {SEND_DATA}')
    return of_base64(f"{place}.data", said.get("data"))


def of_base64(place: str, data: object) -> Picture:
    if not isinstance(data, str):
        raise wrong(place, "must be a text in base64")
    try:
        return Picture(base64.b64decode("".join(data.split()), validate=True), place)  # tools break it into lines
    except (binascii.Error, ValueError):
        raise wrong(place, "is not base64") from None


def check_pictures(pictures: list[Picture], field: str) -> None:
    """Raise ApiError where there are more than are looked at."""
    if len(pictures) > MOST_PICTURES:
        raise ApiError(400, f"'{field}' has {len(pictures)} pictures; at most {MOST_PICTURES}", param=field)

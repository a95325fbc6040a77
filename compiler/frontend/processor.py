"""How a model prepares pictures: the files of its processor, which an artifact carries, tried before it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.frontend.chat import read_object, read_text
from llmc.compiler.frontend.quiet import quiet
from llmc.runtime.errors import LlmcError
from llmc.runtime.processor import FILES, MOST_BYTES, WHOLE_TEXTS, Processor, Section
from llmc.runtime.seams import encoded, joined, pieces
from llmc.runtime.text import load_tokenizer

NAMING = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""The files that may name the processor's class, in transformers' order."""
IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""What configurations call the token that stands for a row."""
LEAVE_OUT = "leave --images out"
SIDES = ((60, 45), (30, 80))
"""Width and height of the pictures that it is tried with."""


def read_processor(
    folder: Path, fields: Mapping[str, Any], tokenizer_json: bytes | None, place: str, most_pixels: int = 0
) -> bytes:
    """The section "processor" of an artifact that takes pictures.

    fields: of the whole model's configuration.  most_pixels: of a picture, which is made smaller; 0: as its files say.
    Raises LlmcError: there is no processor that transformers knows, it
    cannot be made without PyTorch, or a picture's tokens depend on what stands beside it.
    """
    if tokenizer_json is None:
        raise LlmcError("a model without a tokenizer takes no pictures", place=place, hint=LEAVE_OUT)
    token, name = image_token(fields, place), class_name(folder, fields)
    if name is None:
        raise LlmcError("the model's configuration names no processor", place=place, hint=LEAVE_OUT)
    files = {file: read_text(folder / file) for file in FILES if (folder / file).is_file()}
    if sum(map(len, files.values())) > MOST_BYTES:
        raise LlmcError(f"the files of the processor have more than {MOST_BYTES >> 20} MiB", place=place)
    mark = check(Section(name, token, files, token, most_pixels), tokenizer_json.decode(), place)
    said = {"class": name, "image_token": token, "files": files, "mark": mark}
    return json.dumps(said | ({"most_pixels": most_pixels} if most_pixels else {})).encode()


def image_token(fields: Mapping[str, Any], place: str) -> int:
    """The token that stands for a row."""
    token = next((fields[name] for name in IMAGE_TOKENS if isinstance(fields.get(name), int)), None)
    if token is None:
        raise LlmcError(
            "the model's configuration names no token that stands for pictures", place=place, hint=LEAVE_OUT
        )
    return int(token)


def class_name(folder: Path, fields: Mapping[str, Any]) -> str | None:
    """The name of transformers' class, as AutoProcessor finds it; None: there is none."""
    said = (read_object(folder / file).get("processor_class") for file in NAMING)
    found = next((name for name in said if isinstance(name, str)), None)
    if found is None:
        with quiet():
            from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

            found = PROCESSOR_MAPPING_NAMES.get(fields.get("model_type"))
    return found


def check(section: Section, tokenizer_json: str, place: str) -> int:
    """The token that stands for a picture in a text.  Raises LlmcError unless a picture has the tokens beside others
    that it has alone, but for where it meets a text (seams.py)."""
    try:
        processor = Processor(section, tokenizer_json, place)
        from PIL import Image
    except ModuleNotFoundError as error:
        hint = "pip install 'llmc[images]'"
        raise LlmcError(
            f"--images needs the Python package {error.name}, which is not installed", place=place, hint=hint
        ) from None
    mark = processor.image_mark
    text = f"{mark}Two:\n{mark}\nand no more."
    tokenizer = load_tokenizer(tokenizer_json, place)
    token = tokenizer.token_to_id(mark)
    if token is None or encoded(tokenizer, text).count(token) != 2:
        raise LlmcError(f"{mark!r}, which stands for a picture, is not one token", place=place)
    ids = processor.whole.tokenizer(text, **WHOLE_TEXTS)["input_ids"]
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in SIDES]
    alone = [processor(picture) for picture in pictures]
    if any(section.image_token not in each.ids for each in alone):
        raise LlmcError(f"token {section.image_token} does not stand for the rows of a picture", place=place)
    expected = joined(tokenizer, pieces(ids, token, [each.ids for each in alone]))
    if processor.prepare(text, pictures).ids != tuple(expected):
        fact = "the model's processor gives a picture other tokens beside another one than alone"
        raise LlmcError(fact, place=place, hint=LEAVE_OUT)
    return int(token)

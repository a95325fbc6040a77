"""The toy model with a tower, as an artifact that takes pictures: its processor is transformers' own of LLaVA."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from llmc.compiler.frontend.processor import read_processor
from llmc.runtime.binding import Model
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_given
from tests.runtime.stub_artifact import characters_json
from tests.runtime.toy_given import TILE, TILE_ROWS, GivenPlan

MARK = "<image>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}{{ 'a' if add_generation_prompt }}"
)


def tokenizer_json() -> str:
    """Single characters, as the stub's, and a mark for pictures."""
    said = json.loads(characters_json())
    words = list(said["model"]["vocab"])[: toy.VOCAB]
    words[words.index("H")] = MARK
    said["model"]["vocab"] = {word: token for token, word in enumerate(words)}
    said["added_tokens"].append({**said["added_tokens"][0], "id": words.index(MARK), "content": MARK})
    return json.dumps(said)


TOKEN = json.loads(tokenizer_json())["model"]["vocab"][MARK]


def processor(folder: Path) -> bytes:
    """The section: tiles of TILE, each of which becomes TILE_ROWS rows."""
    from transformers import CLIPImageProcessorPil

    _, height, width = TILE
    sizes = {"size": {"shortest_edge": height}, "crop_size": {"height": height, "width": width}}
    CLIPImageProcessorPil(**sizes, do_rescale=False, do_normalize=False).save_pretrained(folder)
    patch = {"patch_size": 2, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **patch}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return read_processor(folder, {"image_token_id": TOKEN}, tokenizer_json().encode(), str(folder))


@cache
def code() -> bytes:
    with TemporaryDirectory() as name:
        return toy_given.build_code(Path(name), GivenPlan(), "-O0")


def build_artifact(folder: Path, **sections: bytes) -> Path:
    chat = json.dumps({"template": TEMPLATE, "tokens": {}}).encode()
    given = {"tokenizer": tokenizer_json().encode(), "chat": chat, **sections}
    if "processor" not in given:
        given["processor"] = processor(folder)
    return toy_given.pack(folder, GivenPlan(), code(), **given)


def tile_of(picture: Image.Image) -> np.ndarray:
    """float32 TILE: what the processor makes of a picture of just that size."""
    assert picture.size == (4, 2)
    return np.asarray(picture, np.float32).transpose(2, 0, 1)


def answer(model: Model, text: str, pictures: list[Image.Image], n: int, **how: Any) -> list[int]:
    """What follows a text with pictures of 4 by 2 in the places of its marks, put together by hand."""
    given = [model.image(tile_of(picture)) for picture in pictures]
    rest = iter(given)
    ids: list[int] = []
    for token in model.encode(text, special=False):
        ids += next(rest).ids if token == TOKEN else [token]
    assert all(len(each.ids) == TILE_ROWS for each in given)
    said = model.tokens(ids, n, ignore_eos=True, **how)
    for each in given:
        each.close()
    return said

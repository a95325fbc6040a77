"""What a small model needs to take pictures: a tokenizer with marks for them, and a processor; and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SIDE, PATCH = 28, 14
MARKS = {"llava": "<image>", "idefics3": "<image>", "internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>"}
"""What stands for a picture in a text."""
ANY_SIZE = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
"""Kinds that take pictures of any size, and their processors."""
MARKS |= dict.fromkeys(ANY_SIZE, "<|image_pad|>")
ROW_MARKS = {"gemma3": "<image_soft_token>"}
"""What stands for a row of one, where that is something else."""
AROUND = dict.fromkeys(ANY_SIZE, "<|vision_start|><|image_pad|><|vision_end|>")
"""What a template writes for a picture, where that is more."""
ROWS, COLUMNS = 6, 6
SPECIAL = (
    *("<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, ROWS + 1) for column in range(1, COLUMNS + 1)),
    *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"),
)
LINES = "\n\n\n"
N_VOCAB = 256 + 1 + len(SPECIAL)
PARTS = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""A chat template as these models have it: what is said comes in parts, and in parts alone."""


def tokenizer() -> Tokenizer:
    """A token for each byte, one for three ends of lines, and the marks behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(LINES, special=False, normalized=False)])
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    return made


def token_of(kind: str) -> int:
    """The token that stands for a row of a picture."""
    token = tokenizer().token_to_id(ROW_MARKS.get(kind, MARKS[kind]))
    assert token is not None
    return token


def save_processor(kind: str, folder: Path, n_rows: int = 4, side: int = SIDE) -> Path:
    """The files of a processor that makes tiles of side by side pixels, each of which becomes n_rows rows."""
    import transformers

    means: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square, names = {"height": side, "width": side}, dict[str, str]()
    if kind == "llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
        said: dict[str, Any] = {"processor_class": "LlavaProcessor", "patch_size": PATCH}
        said |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    elif kind == "idefics3":
        sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
        images = transformers.Idefics3ImageProcessorPil(**sizes, **means)
        said = {"processor_class": "Idefics3Processor", "image_seq_len": n_rows}
    elif kind in ANY_SIZE:
        pixels = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 100 * (2 * PATCH) ** 2}
        images = transformers.Qwen2VLImageProcessorPil(size=pixels, patch_size=PATCH, merge_size=2, **means)
        said = {"processor_class": ANY_SIZE[kind]}
        names = {"image_token": MARKS[kind], "video_token": "<|video_pad|>"}
    elif kind == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size=square, **means)
        said = {"processor_class": "Gemma3Processor", "image_seq_length": n_rows}
        names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    else:
        images = transformers.GotOcr2ImageProcessorPil(size=square, max_patches=4, crop_to_patches=True)
        said = {"processor_class": "InternVLProcessor", "image_seq_length": n_rows}
        names = {"start_image_token": "<img>", "end_image_token": "</img>"}
        names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **ends, extra_special_tokens=names)
    whole.save_pretrained(folder)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text(PARTS.replace("IMAGE", AROUND.get(kind, MARKS[kind])))
    return folder


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

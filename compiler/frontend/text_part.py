"""The text part of a model that takes images or sound too: a decoder like others, inside a larger checkpoint.

Its configuration stands in the whole one's `text_config`, or, in older files, among the whole one's own fields; its
tensors have `language_model.` in front of their names, or `model.language_model.` in place of `model.`; some say
`text_model` for it.  To a text it says what the whole model says where there is no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from llmc.compiler.frontend.config import parse_whole
from llmc.runtime.parse_json import parse_json

TEXT, PICTURES = "text_config", "vision_config"
T = TypeVar("T")
INHERITED = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id")
"""What the whole model's configuration says for its text part too."""
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.", ""),
    ("model.text_model.", "model."),
    ("text_model.", "model."),
)
"""How the names of its tensors begin in the whole, and by themselves."""

TIED = "tie_word_embeddings"
HEAD = "lm_head.weight"
"""It stands beside `model.language_model` in the whole, and behind it in older checkpoints."""


def text_fields(fields: dict[str, Any], place: str) -> dict[str, Any] | None:
    """The text part's configuration; None for a model of text alone.  place: where the fields are from."""
    text = fields.get(TEXT)
    if text is None and isinstance(fields.get(PICTURES), dict):
        text = among_fields(fields, place)
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        return None
    inherited = [name for name in INHERITED if text.get(name) is None and fields.get(name) is not None]
    return text | {name: fields[name] for name in inherited}


def among_fields(fields: dict[str, Any], place: str) -> dict[str, Any] | None:
    """The text part's configuration where its fields are the whole's own, as transformers sorts them; None where it
    knows no text part of such a model."""
    from transformers import CONFIG_MAPPING

    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING or TEXT not in CONFIG_MAPPING[model_type].sub_configs:
        return None
    text: dict[str, Any] = parse_json(parse_whole(fields, place).get_text_config().to_json_string().encode())
    return text | ({TIED: fields[TIED]} if TIED in fields else {})


def text_tensors(checkpoint: Mapping[str, T]) -> dict[str, T]:
    """The text part's tensors (or whatever is said of tensors), under the names that they have in a model of their own.

    Where none is marked as the text part's, they are all taken as they are: some checkpoints hold that part alone.
    """
    tensors: dict[str, T] = {}
    for name, tensor in checkpoint.items():
        for whole, own in PREFIXES:
            if name.startswith(whole):
                tensors[own + name.removeprefix(whole)] = tensor
                break
        else:
            if name == HEAD:
                tensors[name] = tensor
    return tensors if len(tensors) > 1 else dict(checkpoint)

"""The configuration of a model: config.json, checked for what can be compiled before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig


SAME = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers has under another name."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""What configurations call the number of layers."""
MOST_LAYERS = 1000
"""A configuration of more layers would take hours and all memory before something else refuses it."""
LIMIT = "max_position_embeddings"
LIMITS = (LIMIT, "max_seq_len", "seq_length")
"""What configurations call the most tokens of a sequence; the last two where positions are not embedded."""
KINDS = ("layer_types", "layers_block_type")
"""What configurations call the list of their layers' kinds."""
LABELLED = "ForSequenceClassification"
"""How transformers' names of classifiers of texts end."""
FLOAT, FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a model folder's config.json."""
    if not folder.is_dir():
        raise LlmcError(f"no such folder: {folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise LlmcError("the folder has no config.json", place=str(folder), hint="it is not a Hugging Face model")
    try:
        fields = parse_json(file.read_bytes())
    except ValueError as error:
        raise LlmcError(f"config.json is not JSON: {error}", place=str(file)) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise LlmcError("config.json names no model_type", place=str(file), hint="it is not a Hugging Face model")
    return fields


def config_dtype(fields: dict[str, Any]) -> str | None:
    """The dtype that the configuration names ("float16"), whichever way it was written."""
    dtype = fields.get("dtype") or fields.get("torch_dtype")
    return str(dtype).removeprefix("torch.") if dtype else None


def architecture_of(fields: dict[str, Any]) -> str | None:
    """The class that the configuration names first, if it names one."""
    named = fields.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def is_labelled(architecture: str | None) -> bool:
    """Whether the class of this name gives texts labels."""
    return architecture is not None and architecture.endswith(LABELLED)


def with_floats(value: Any) -> Any:
    """The value with numbers in place of what transformers writes for those that JSON lacks: {"__float__": "NaN"}."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT} and value[FLOAT] in FLOATS:
            return float(value[FLOAT])
        return {name: with_floats(part) for name, part in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def parse_config(fields: dict[str, Any], place: str) -> PretrainedConfig:
    """The configuration as transformers understands it; refuses what is neither a causal decoder nor an encoder that
    it knows.

    place: where the fields came from, for the message.
    """
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    from llmc.compiler.frontend.classes import is_encoder
    from llmc.compiler.frontend.text_of_whole import whole_of

    model_type = SAME.get(fields["model_type"], fields["model_type"])
    architecture = architecture_of(fields) or model_type

    def refuse(reason: str, hint: str | None = None) -> LlmcError:
        return LlmcError(f"the architecture {architecture} is not supported: {reason}", place=place, hint=hint)

    if model_type not in CONFIG_MAPPING:
        if fields.get("auto_map"):
            raise refuse("it needs code of its own from the hub (auto_map), and llmc runs none")
        raise refuse(f"transformers does not know the model type {model_type!r}", "a newer transformers may")
    if fields.get("is_encoder_decoder"):
        raise refuse("it is an encoder and a decoder; llmc compiles decoders alone")
    kind = CONFIG_MAPPING[model_type]
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING or whole_of(kind) is not None
    if not is_decoder and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        raise refuse("it is neither a causal language model nor an encoder of texts")
    if is_labelled(architecture_of(fields)) and kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise refuse("transformers has no head for labels of such a model", "--task generate, or embed, does without")
    check_said_layers(fields, place)
    config = parse_fields(kind, fields, place)
    if not is_decoder and not is_encoder(config):
        raise refuse("it is a decoder that is no causal language model")
    return config


def parse_whole(fields: dict[str, Any], place: str) -> PretrainedConfig:
    """The configuration of a model that takes pictures and texts; refuses what transformers does not know as one."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    model_type = fields["model_type"]
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        what = architecture_of(fields) or model_type
        raise LlmcError(f"transformers knows no model of pictures and texts called {what}", place=place)
    for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        check_said_layers(part, place)
    return parse_fields(CONFIG_MAPPING[model_type], fields, place)


def parse_fields(kind: Any, fields: dict[str, Any], place: str) -> PretrainedConfig:
    """The fields as a configuration of this class."""
    from llmc.compiler.frontend.quiet import quiet

    rest = {name: with_floats(value) for name, value in fields.items() if name not in ("model_type", "auto_map")}
    try:
        with quiet():
            config: PretrainedConfig = kind.from_dict(rest)
    except Exception as error:  # a configuration's own checks raise anything at all
        said = " ".join(str(error).split())[:300]
        raise LlmcError(f"the configuration is not valid: {said}", place=place) from error
    return config


def check_layers(n_layers: int, place: str | None = None) -> None:
    """Refuse a model of more layers than any has."""
    if n_layers > MOST_LAYERS:
        fact = f"the configuration describes no model: it has {n_layers} layers, more than {MOST_LAYERS}"
        raise LlmcError(fact, place=place)


def check_said_layers(fields: dict[str, Any], place: str) -> None:
    """The same of what a configuration's fields say; of layers some make lists."""
    for n_layers in (fields.get(name) for name in LAYERS):
        if isinstance(n_layers, int):
            check_layers(n_layers, place)


def max_tokens(config: PretrainedConfig) -> int:
    """The most tokens of a sequence; 0 where the configuration does not say."""
    return next((limit for name in LIMITS if (limit := getattr(config, name, None))), 0)


def kinds_of(config: PretrainedConfig) -> list[str]:
    """What the configuration says of each layer's kind; nothing, where it says nothing."""
    lists = (getattr(config, name, None) for name in KINDS)
    return list(next((kinds for kinds in lists if isinstance(kinds, list | tuple)), ()))

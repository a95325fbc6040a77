"""Which of transformers' classes a configuration is built with: a causal language model, a bare encoder, or, where the
configuration names one, a classifier of texts; the text part of a model of pictures has none of its own, but for that
whole model's."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from llmc.compiler.frontend.config import is_labelled
from llmc.compiler.frontend.text_of_whole import build_text_of_whole, whole_of

POOLER = "add_pooling_layer"
"""The argument that says whether some encoders end with a pooling layer of their own, which embeddings do without."""


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model fills gaps in texts, and so sees what is behind a token: transformers has a masked language
    model of its kind, and it is neither a decoder nor made of an encoder and a decoder."""
    kind = type(config)
    if kind not in MODEL_FOR_MASKED_LM_MAPPING or kind not in MODEL_MAPPING or getattr(config, "is_decoder", False):
        return False
    return not kind().is_encoder_decoder


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the class that the configuration names first gives texts labels."""
    return is_labelled(next(iter(config.architectures or ()), None))


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that is compiled, or that of the whole model of which it is the text part."""
    kind, maker = type(config), maker_of(config)
    if whole := whole_of(kind):
        kind, maker = whole, AutoModelForImageTextToText
    found = maker._model_mapping[kind]
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return model_class


def maker_of(config: PretrainedConfig) -> Any:
    """Which of transformers' makers of models makes it."""
    if is_classifier(config):
        return AutoModelForSequenceClassification
    return AutoModel if is_encoder(config) else AutoModelForCausalLM


def build(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model, its weights made up.  options: transformers' own."""
    if whole_of(type(config)):
        return build_text_of_whole(config, **options)
    model: PreTrainedModel = maker_of(config).from_config(config, **extra(config), **options)
    return model


def load(folder: Any, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model with the weights of a folder."""
    model: PreTrainedModel = maker_of(config).from_pretrained(
        folder, config=config, local_files_only=True, **extra(config), **options
    )
    return model


def extra(config: PretrainedConfig) -> dict[str, Any]:
    """Further arguments of the class."""
    known = (
        is_encoder(config) and not is_classifier(config) and POOLER in signature(class_of(config).__init__).parameters
    )
    return {POOLER: False} if known else {}

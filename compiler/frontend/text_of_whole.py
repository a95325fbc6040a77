"""The text part of a model that transformers has with its pictures alone, as a causal language model: its decoder and
its head, under the names that other models have for them.

Which model a text part's configuration is of, transformers says: the configuration of the whole has it as its
`text_config`.  What the whole does with a text is seen by running it: its logits are its head of what its decoder makes
of the tokens, or it is refused.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llmc.runtime.errors import LlmcError

OF_TEXT = "text_config"
"""What a whole model's configuration calls that of its text part."""


def whole_of(kind: type[PretrainedConfig]) -> type[PretrainedConfig] | None:
    """The kind of configuration whose text part is of this kind; None where the part is a model of its own, or of none
    that takes pictures."""
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    for value in vars(sys.modules[kind.__module__]).values():
        is_config = isinstance(value, type) and issubclass(value, PretrainedConfig)
        if is_config and value.sub_configs.get(OF_TEXT) is kind and value in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            found: type[PretrainedConfig] = value
            return found
    return None


class TextOfWhole(PreTrainedModel):  # type: ignore[misc]
    """logits [B, S, V] of `input_ids` or `inputs_embeds`, at `position_ids`; all as the decoder has them.
    told: what else it may be told."""

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig, decoder: torch.nn.Module, head: torch.nn.Module) -> None:
        super().__init__(config)
        self.model, self.lm_head = decoder, head
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **told: Any,
    ) -> CausalLMOutputWithPast:
        made = self.model(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **told
        )
        return CausalLMOutputWithPast(logits=self.lm_head(made.last_hidden_state))


def build_text_of_whole(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The text part of this configuration, its weights made up.  options: those of `from_config`."""
    kind = whole_of(type(config))
    assert kind is not None
    whole = AutoModelForImageTextToText.from_config(kind(**{OF_TEXT: config}), **options)
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    if decoder is None or decoder is whole or not isinstance(head, torch.nn.Linear):
        raise LlmcError(f"transformers does not say what the text part of {type(whole).__name__} is")
    check_head(whole, decoder, head)
    named = type(type(decoder).__name__, (TextOfWhole,), {"__module__": type(decoder).__module__})
    part: PreTrainedModel = named(decoder.config, decoder, head)
    return part


def check_head(whole: PreTrainedModel, decoder: torch.nn.Module, head: torch.nn.Module) -> None:
    """Raises LlmcError unless the whole's logits of a text are its head of what its decoder gives, and nothing else."""
    hidden = torch.arange(6.0).reshape(1, 3, 2)
    seen: list[torch.Tensor] = []

    def of_head(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x + 0.5

    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    head.forward = of_head
    try:
        with torch.no_grad():
            logits = whole(inputs_embeds=torch.zeros(1, 3, 2), use_cache=False).logits
    finally:
        del decoder.forward, head.forward
    if not (len(seen) == 1 and torch.equal(seen[0], hidden) and torch.equal(logits, hidden + 0.5)):
        raise LlmcError(f"the logits of {type(whole).__name__} are more than a product of what its text part makes")

"""The error that says that an architecture is not compiled, and why."""

from __future__ import annotations

import sys

from transformers import PretrainedConfig

from llmc.compiler.frontend.classes import class_of
from llmc.runtime.errors import LlmcError

OWN_ATTENTION = "its attention does not go through transformers' attention interface"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The name by which a model's code looks its attention up, if it goes through transformers' attention interface."""


def has_own_attention(config: PretrainedConfig) -> bool:
    """Whether the model's code has its attention written out, and no way to put another function in its place."""
    model_class = class_of(config)
    return not hasattr(sys.modules[model_class.__module__], INTERFACE)


def unsupported(config: PretrainedConfig, reason: str) -> LlmcError:
    """The error that says why the architecture of this configuration is not compiled."""
    model_class = class_of(config)
    if has_own_attention(config):
        reason = OWN_ATTENTION
    return LlmcError(
        f"the architecture {model_class.__name__} is not supported: {reason}",
        hint="Llama, OPT, Qwen 2 and 3, Mistral, Gemma, Phi 3, GPT-2 and their kin are",
    )

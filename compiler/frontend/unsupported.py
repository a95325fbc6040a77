"""How an architecture is refused."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from llmc.runtime.errors import LlmcError


def unsupported(config: PretrainedConfig, reason: str) -> LlmcError:
    """The error that says why the architecture of this configuration is not compiled."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not model_class._supports_attention_backend:
        reason = "its attention does not go through transformers' attention interface"
    return LlmcError(
        f"the architecture {model_class.__name__} is not supported: {reason}",
        hint="Llama, OPT, Qwen 2 and 3, Mistral, Gemma, Phi 3, GPT-2 and their kin are",
    )

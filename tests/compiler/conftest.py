"""Small models with random weights, saved as Hugging Face folders."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

SaveModel = Callable[..., Path]
N_VOCAB = 131
N_CONTEXT = 96


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """save_model(config, dtype=torch.float32, **save_pretrained's options) -> a folder with random weights."""

    def save(config: PretrainedConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(config.model_type)
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms of one and biases of zero would hide a mistake
                    parameter.add_(torch.randn_like(parameter) / 10)
        model.save_pretrained(folder, **options)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_config() -> Callable[[str], PretrainedConfig]:
    """The configuration of a small model, by the names below."""
    return lambda name: TINY[name]()


@pytest.fixture(scope="session")
def tiny_model(save_model: SaveModel) -> Callable[[str], Path]:
    """The folder of a small model in float32, by the names below; the same one each time."""
    return cache(lambda name: save_model(TINY[name]()))


SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CONTEXT,
    "initializer_range": 0.1,
}
OPT_SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CONTEXT,
    "init_std": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    # heads of 80
    "llama-bias": lambda: LlamaConfig(
        **{**SIZES, "hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1},
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama-tied": lambda: LlamaConfig(**SIZES, head_dim=128, tie_word_embeddings=True),
    # every other layer without rotary, deep enough for the two to be exported twice and repeated
    "smollm3-deep": lambda: SmolLM3Config(
        **SIZES | {"num_hidden_layers": 7},
        no_rope_layers=[1, 0, 1, 0, 1, 0, 1],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": lambda: OPTConfig(**OPT_SIZES),
    "opt-350m": lambda: OPTConfig(**{**OPT_SIZES, "word_embed_proj_dim": 32}, do_layer_norm_before=False),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=24),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=24),
    # its attention has a softcap, which torch's own attention function does not
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=24, sliding_window=24, query_pre_attn_scalar=24),
    "phi3": lambda: Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=N_VOCAB, n_positions=N_CONTEXT, bos_token_id=1, eos_token_id=2
    ),
}

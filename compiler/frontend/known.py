"""Models known by a short name: their place on the hub, and the configuration of the published checkpoint.

With its configuration here, a model with random weights needs no network.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class KnownModel(NamedTuple):
    """A hub id and the fields of its config.json."""

    hub_id: str
    config: dict[str, Any]


def _llama(hidden: int, intermediate: int, n_layers: int, n_heads: int, n_kv_heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float16",
        **rest,
    }


def _opt(hidden: int, n_layers: int, n_heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "word_embed_proj_dim": hidden,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "init_std": 0.02,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "dtype": "float16",
        **rest,
    }


_TINYLLAMA = {"max_position_embeddings": 2048, "dtype": "bfloat16"}
_LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}

KNOWN_MODELS = {
    "llama2-7b": KnownModel("meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, 32)),
    "llama2-13b": KnownModel("meta-llama/Llama-2-13b-hf", _llama(5120, 13824, 40, 40, 40)),
    "llama3-8b": KnownModel("meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8, **_LLAMA3)),
    "tinyllama-1.1b": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(2048, 5632, 22, 32, 4, **_TINYLLAMA)),
    "opt-125m": KnownModel("facebook/opt-125m", _opt(768, 12, 12)),
    "opt-350m": KnownModel(
        "facebook/opt-350m", _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)
    ),
    "opt-1.3b": KnownModel("facebook/opt-1.3b", _opt(2048, 24, 32)),
    "opt-2.7b": KnownModel("facebook/opt-2.7b", _opt(2560, 32, 32)),
    "opt-6.7b": KnownModel("facebook/opt-6.7b", _opt(4096, 32, 32)),
    "opt-13b": KnownModel("facebook/opt-13b", _opt(5120, 40, 40)),
}

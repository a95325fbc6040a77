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


_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}


def _qwen3(hidden: int, intermediate: int, n_layers: int, n_heads: int, *, tied: bool = False) -> dict[str, Any]:
    rest = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_QWEN3, "tie_word_embeddings": tied}
    return _llama(hidden, intermediate, n_layers, n_heads, 8, **rest)


_MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "dtype": "bfloat16",
}
_QWEN3_MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    **_QWEN3,
}
_OLMOE = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 50304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "bos_token_id": None,
    "pad_token_id": 1,
    "eos_token_id": 50279,
    "dtype": "bfloat16",
}

_GPT_OSS = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201088,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "attention_bias": True,
    "bos_token_id": None,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
    "dtype": "bfloat16",
}


def _gpt_oss(n_layers: int, n_experts: int) -> dict[str, Any]:
    fields = _llama(2880, 2880, n_layers, 64, 8, num_local_experts=n_experts, **_GPT_OSS)
    del fields["rope_theta"]
    return fields


_YARN_V2 = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
_DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_scaling": _YARN_V2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "dtype": "bfloat16",
}
_GLM45_AIR = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": 151552,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": False,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "bos_token_id": None,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "dtype": "bfloat16",
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


def _llama31(factor: float, **rest: Any) -> dict[str, Any]:
    """What Llama 3.1 and 3.2 have beside Llama 3: rotary angles stretched for long contexts."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    return {**_LLAMA3, "max_position_embeddings": 131072, "rope_scaling": scaling, **rest}


_MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "dtype": "bfloat16",
}
_GEMMA3_1B = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}

_FALCON_7B = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "dtype": "bfloat16",
}
_BLOOM_7B1 = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "vocab_size": 250880,
    "hidden_size": 4096,
    "n_layer": 30,
    "n_head": 32,
    "seq_length": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "dtype": "float16",
}
_GPT_J_6B = {
    "model_type": "gptj",
    "architectures": ["GPTJForCausalLM"],
    "vocab_size": 50400,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_positions": 2048,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_MPT_7B = {
    "model_type": "mpt",
    "architectures": ["MptForCausalLM"],
    "vocab_size": 50432,
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "expansion_ratio": 4,
    "max_seq_len": 2048,
    "no_bias": True,
    "attn_config": {"alibi": True, "alibi_bias_max": 8},
    "dtype": "bfloat16",
}

KNOWN_MODELS = {
    "llama2-7b": KnownModel("meta-llama/Llama-2-7b-hf", _llama(4096, 11008, 32, 32, 32)),
    "llama2-13b": KnownModel("meta-llama/Llama-2-13b-hf", _llama(5120, 13824, 40, 40, 40)),
    "llama3-8b": KnownModel("meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8, **_LLAMA3)),
    "llama3.1-8b": KnownModel("meta-llama/Llama-3.1-8B", _llama(4096, 14336, 32, 32, 8, **_llama31(8.0))),
    "llama3.2-1b": KnownModel(
        "meta-llama/Llama-3.2-1B",
        _llama(2048, 8192, 16, 32, 8, **_llama31(32.0, head_dim=64, tie_word_embeddings=True)),
    ),
    "llama3.2-3b": KnownModel(
        "meta-llama/Llama-3.2-3B",
        _llama(3072, 8192, 28, 24, 8, **_llama31(32.0, head_dim=128, tie_word_embeddings=True)),
    ),
    "mistral-7b": KnownModel("mistralai/Mistral-7B-v0.3", _llama(4096, 14336, 32, 32, 8, **_MISTRAL)),
    "qwen3-0.6b": KnownModel("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, tied=True)),
    "qwen3-1.7b": KnownModel("Qwen/Qwen3-1.7B", _qwen3(2048, 6144, 28, 16, tied=True)),
    "qwen3-4b": KnownModel("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32, tied=True)),
    "qwen3-8b": KnownModel("Qwen/Qwen3-8B", _qwen3(4096, 12288, 36, 32)),
    "qwen3-14b": KnownModel("Qwen/Qwen3-14B", _qwen3(5120, 17408, 40, 40)),
    "qwen3-32b": KnownModel("Qwen/Qwen3-32B", _qwen3(5120, 25600, 64, 64)),
    "gemma3-1b": KnownModel("google/gemma-3-1b-pt", _GEMMA3_1B),
    "tinyllama-1.1b": KnownModel("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(2048, 5632, 22, 32, 4, **_TINYLLAMA)),
    "opt-125m": KnownModel("facebook/opt-125m", _opt(768, 12, 12)),
    "opt-350m": KnownModel(
        "facebook/opt-350m", _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)
    ),
    "opt-1.3b": KnownModel("facebook/opt-1.3b", _opt(2048, 24, 32)),
    "opt-2.7b": KnownModel("facebook/opt-2.7b", _opt(2560, 32, 32)),
    "opt-6.7b": KnownModel("facebook/opt-6.7b", _opt(4096, 32, 32)),
    "opt-13b": KnownModel("facebook/opt-13b", _opt(5120, 40, 40)),
    "falcon-7b": KnownModel("tiiuae/falcon-7b", _FALCON_7B),
    "bloom-7b1": KnownModel("bigscience/bloom-7b1", _BLOOM_7B1),
    "gpt-j-6b": KnownModel("EleutherAI/gpt-j-6b", _GPT_J_6B),
    "mpt-7b": KnownModel("mosaicml/mpt-7b", _MPT_7B),
    "mixtral-8x7b": KnownModel("mistralai/Mixtral-8x7B-v0.1", _llama(4096, 14336, 32, 32, 8, **_MIXTRAL)),
    "qwen3-30b-a3b": KnownModel("Qwen/Qwen3-30B-A3B", _llama(2048, 6144, 48, 32, 4, **_QWEN3_MIXTURE)),
    "gpt-oss-20b": KnownModel("openai/gpt-oss-20b", _gpt_oss(24, 32)),
    "gpt-oss-120b": KnownModel("openai/gpt-oss-120b", _gpt_oss(36, 128)),
    "olmoe-1b-7b": KnownModel("allenai/OLMoE-1B-7B-0924", _llama(2048, 1024, 16, 16, 16, **_OLMOE)),
    "deepseek-v2-lite": KnownModel(
        "deepseek-ai/DeepSeek-V2-Lite", _llama(2048, 10944, 27, 16, 16, **_DEEPSEEK_V2_LITE)
    ),
    "glm-4.5-air": KnownModel("zai-org/GLM-4.5-Air", _llama(4096, 10944, 46, 96, 8, **_GLM45_AIR)),
}

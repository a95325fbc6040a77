"""Small models of many families, from their configurations: what tests compile, and what is carried to a GPU.

python -m tests.families OUT [--positions 256]     # a folder for each, for bench/gpu/prepare.py --small OUT
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from tests.compiler.test_packed import in_gptq

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_SCALE = 2.0
"""lora_alpha / r of each adapter."""
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: dict[str, Any] = {"head_dim": 16}
WINDOW: dict[str, Any] = {**HEADS, "sliding_window": 24}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GROUPS: dict[str, Any] = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 160,
    "final_logit_softcapping": 8.0,
}
"""Layers that attend the keys and values of others, and an embedding for each layer."""
STATES: dict[str, Any] = {
    **HEADS,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bloom": {},
    "cohere": {},
    "deepseek_v3": {**GROUPS, **LATENT},
    "ernie4_5": HEADS,
    "exaone4": {"sliding_window": 24},
    "falcon": {},
    "falcon_mamba": {"num_hidden_layers": 1, "state_size": 8, "time_step_rank": 4, "intermediate_size": 96},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3n_text": {  # four streams, sparse activations in the first layer, its keys and values in the second one
        **HEADS,
        **SHARED,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "intermediate_size": [96] * 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "gemma4_text": {  # of all its sizes something: its layers differ, are shared, have experts and inputs of their own
        **WINDOW,
        **SHARED,
        "global_head_dim": 48,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_double_wide_mlp": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
    "glm": HEADS,
    "glm4_moe": {**HEADS, **GROUPS},
    "gpt_neox": {},
    "gpt_oss": {
        **WINDOW,
        "num_hidden_layers": 1,  # of the kind with a window
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.3,
        "rope_parameters": YARN,
    },
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 48,
        "position_embedding_type": "nope",
    },
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "jamba": {
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "kimi_linear": {
        **GROUPS,
        **LATENT,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "q_lora_rank": None,
        "linear_num_heads": 2,
        "linear_head_dim": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,  # all of them: where two are as good, roundings would choose another
        "n_group": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        **HEADS,
        "no_rope_layers": [1, 0],  # the first one in chunks
        "intermediate_size_mlp": 80,
        "attention_chunk_size": 12,
        "floor_scale": 8,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
    },
    "mimo_v2_flash": {
        **GROUPS,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 16,
        "sliding_window": 24,
    },
    "nemotron": {},
    "olmo2": {},
    "qwen3": HEADS,
    "qwen3_5_text": STATES,
    "smollm3": {},
    "stablelm": {},
}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 128, "intermediate_size": 192}),
    "opt": ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "init_std": 0.1}),
    "gemma4-wide": ("gemma4_text", {"head_dim": 256, "global_head_dim": 512}),
    "deepseek_v3": ("deepseek_v3", {"qk_rope_head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
    ),
    "mamba": ("mamba", {"intermediate_size": 160}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2}),
    "qwen3_next": (
        "qwen3_next",
        {
            **STATES,
            "num_experts": 4,
            "num_experts_per_tok": 4,  # all of them: where two are as good, roundings would choose another
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
    ),
}
"""What else is carried to a GPU: of a family, other sizes."""
WINDOWS = ["sliding_attention", "full_attention"]
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"num_key_value_heads": 4}),
    "bert-wide": ("bert", {"hidden_size": 256, "num_key_value_heads": 4}),
    "xlm-roberta": ("xlm-roberta", {"hidden_size": 128, "num_key_value_heads": 4, "type_vocab_size": 1}),
    "mpnet": ("mpnet", {"num_key_value_heads": 4}),
    "modernbert": ("modernbert", {"num_key_value_heads": 4, "local_attention": 32, "layer_types": WINDOWS}),
    "embedding_gemma": (
        "gemma3_text",
        {
            **HEADS,
            "head_dim": 256,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "sliding_window": 20,
            "layer_types": WINDOWS,
            "use_bidirectional_attention": True,
        },
    ),
}
"""Models that read a text whole, likewise: heads of 16, 64, 32 and 256."""
WITH_ZEROS = ("llama", "qwen3_moe")
"""Those that there are with weights of 4 bits and zeros too, as GPTQ has them."""


def save(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, kind: Any = AutoModelForCausalLM, **sizes: Any
) -> Path:
    """A small random model; gpt-oss's experts are in MXFP4, as its checkpoints have them."""
    torch.manual_seed(0)
    model = kind.from_config(CONFIG_MAPPING[family](**SIZES | FAMILIES.get(family, {}) | sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):  # norms of one and biases of zero would hide a mistake
                parameter.add_(torch.randn_like(parameter) / 10)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer) / 10)
    model.to(dtype).save_pretrained(folder)
    if family == "gpt_oss":
        keep_in_mxfp4(folder)
    return folder


def save_adapter(model: Any, folder: Path, rank: int, targets: Sequence[str]) -> Path:
    """A LoRA adapter of a model's modules of these names, of random numbers, as PEFT saves it; model: or its folder."""
    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    tensors: dict[str, torch.Tensor] = {}
    drawn = torch.Generator().manual_seed(crc32(folder.name.encode()))  # the same ones whatever was drawn before
    for name, module in changed(model, targets):
        sizes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
        for part, size in sizes.items():
            tensors[f"base_model.model.{name}.{part}.weight"] = torch.randn(size, generator=drawn) / 8
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": ADAPTER_SCALE * rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def changed(model: Any, targets: Sequence[str]) -> list[tuple[str, Any]]:
    """The modules that an adapter changes."""
    return [(name, module) for name, module in model.named_modules() if name.split(".")[-1] in targets]


def keep_in_mxfp4(folder: Path) -> None:
    """Give each tensor of experts random blocks and scales in its place."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, k, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (n_experts, rows, k // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, (n_experts, rows, k // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(fields))


def save_with_adapters(family: str, folder: Path, positions: int) -> Path:
    """A model, and beside it two adapters: of all its products, and of some."""
    sizes = {
        "intermediate_size": 192,
        "max_position_embeddings": positions,
    }  # whole tiles, so that gate and up alternate
    model = save(family, folder / f"{family}-adapters", torch.bfloat16, **sizes)
    for name, rank, targets in (("all", 4, ALL), ("some", 12, ("q_proj", "v_proj", "down_proj"))):
        save_adapter(model, model / "adapters" / name, rank, targets)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--positions", type=int, default=256, help="[default: 256]")
    options = parser.parse_args()
    for name, (family, sizes) in ({family: (family, {}) for family in FAMILIES} | MORE).items():
        save(family, options.out / name, torch.bfloat16, max_position_embeddings=options.positions, **sizes)
    for name, (family, sizes) in ENCODERS.items():
        save(family, options.out / name, torch.bfloat16, AutoModel, max_position_embeddings=options.positions, **sizes)
    for name in WITH_ZEROS:
        in_gptq(options.out / name, options.out / f"{name}-zeros", zeros=True)
    save_with_adapters("llama", options.out, options.positions)


if __name__ == "__main__":
    main()

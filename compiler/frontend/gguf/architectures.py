"""llama.cpp's architectures, as GGUF files name them, and what each is in transformers.

A file says less than config.json does, and llama.cpp knows the rest of each architecture: whether weights of norms
stand there with 1 added, in which order rows lie, what is the same for all models of it.  That is what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmc.compiler.frontend.gguf.kind import (
    ALTERNATING,
    ATTENTION_NAMES,
    COLUMNS,
    EXPERT_SIZES,
    EXPERTS,
    FUSED_MLP_NAMES,
    GRANITE,
    HEAD_NORM_NAMES,
    LAYER_NAMES,
    MLP_NAMES,
    PRE_NORM_NAMES,
    ROUTER_NAME,
    ROWS,
    SANDWICH_NAMES,
    SHARED_EXPERT_NAMES,
    SHARED_EXPERTS_NAMES,
    SLIDING,
    Architecture,
)
from llmc.compiler.frontend.gguf.latent import DEEPSEEK_V3
from llmc.compiler.frontend.gguf.mamba import FALCON_H1, GRANITE_HYBRID, NEMOTRON_H
from llmc.compiler.frontend.gguf.scan import JAMBA, MAMBA
from llmc.compiler.frontend.gguf.states import LFM2, LFM2_MOE, QWEN3_NEXT, QWEN35, QWEN35_MOE

MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    {**PRE_NORM_NAMES, **ATTENTION_NAMES, **ROUTER_NAME},
    turns_neighbours=True,
    experts=("mlp.experts", ROWS),
    fields={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
"""What a file of "llama" is that has experts."""
COHERE = {"logit_scale": "logit_scale"}
LAYER_NORM = "attention.layer_norm_epsilon"

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", turns_neighbours=True),
    "mistral3": Architecture(
        "ministral3",
        "Ministral3ForCausalLM",
        turns_neighbours=True,
        read=("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**LAYER_NAMES, **HEAD_NORM_NAMES}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**PRE_NORM_NAMES, **ATTENTION_NAMES, **ROUTER_NAME, **SHARED_EXPERT_NAMES},
        experts=("mlp.experts", ROWS),
        fields={**EXPERT_SIZES, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        settings={"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**PRE_NORM_NAMES, **ATTENTION_NAMES, **HEAD_NORM_NAMES, **ROUTER_NAME},
        experts=("mlp.experts", ROWS),
        fields=EXPERT_SIZES,
        settings={"norm_topk_prob": True},
    ),
    "olmoe": Architecture(
        "olmoe",
        "OlmoeForCausalLM",
        {**PRE_NORM_NAMES, **ATTENTION_NAMES, **HEAD_NORM_NAMES, **ROUTER_NAME},
        experts=("mlp.experts", ROWS),
        fields=EXPERTS,
        settings={"norm_topk_prob": False},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            **ATTENTION_NAMES,
        },
        experts=("mlp.experts", ALTERNATING),
        fields={**SLIDING, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        settings={"swiglu_limit": 7.0},
    ),
    "llama4": Architecture(
        "llama4_text",
        "Llama4ForCausalLM",
        {
            **PRE_NORM_NAMES,
            **ATTENTION_NAMES,
            **{name: own.replace("mlp", "feed_forward") for name, own in MLP_NAMES.items()},
            **{f"{name}_shexp": own.replace("mlp", "feed_forward.shared_expert") for name, own in MLP_NAMES.items()},
            "ffn_gate_inp": "feed_forward.router",
        },
        experts=("feed_forward.experts", COLUMNS),
        fields={
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "feed_forward_length": "intermediate_size_mlp",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        settings={"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            **ATTENTION_NAMES,
            **HEAD_NORM_NAMES,
            **MLP_NAMES,
            **ROUTER_NAME,
            **SHARED_EXPERTS_NAMES,
            "exp_probs_b": "mlp.gate.e_score_correction_bias",
        },
        experts=("mlp.experts", ROWS),
        turns_part=True,
        fields={
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
        },
    ),
    "deepseek2": DEEPSEEK_V3,
    "qwen3next": QWEN3_NEXT,
    "qwen35": QWEN35,
    "qwen35moe": QWEN35_MOE,
    "lfm2": LFM2,
    "lfm2moe": LFM2_MOE,
    "mamba": MAMBA,
    "jamba": JAMBA,
    "granitehybrid": GRANITE_HYBRID,
    "falcon-h1": FALCON_H1,
    "nemotron_h": NEMOTRON_H,
    "gemma": Architecture("gemma", "GemmaForCausalLM", adds_one=True),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        {**SANDWICH_NAMES, **ATTENTION_NAMES, **MLP_NAMES},
        adds_one=True,
        fields={
            **SLIDING,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**SANDWICH_NAMES, **ATTENTION_NAMES, **HEAD_NORM_NAMES, **MLP_NAMES},
        adds_one=True,
        fields=SLIDING,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {**PRE_NORM_NAMES, **FUSED_MLP_NAMES, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"},
        turns_part=True,
        fields=SLIDING,
    ),
    "olmo2": Architecture(
        "olmo2",
        "Olmo2ForCausalLM",
        {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            **ATTENTION_NAMES,
            **HEAD_NORM_NAMES,
            **MLP_NAMES,
        },
    ),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        turns_neighbours=True,
        fields=GRANITE,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**PRE_NORM_NAMES, **ATTENTION_NAMES, "ffn_gate_inp": "block_sparse_moe.router"},
        turns_neighbours=True,
        experts=("block_sparse_moe.experts", ROWS),
        fields={**GRANITE, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    ),
    "exaone4": Architecture(
        "exaone4",
        "Exaone4ForCausalLM",
        {
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            **ATTENTION_NAMES,
            **HEAD_NORM_NAMES,
            **MLP_NAMES,
        },
        fields=SLIDING,
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", bias="use_bias"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", turns_neighbours=True),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            **ATTENTION_NAMES,
            **MLP_NAMES,
        },
        settings={"attention_out_bias": False},
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        {
            **PRE_NORM_NAMES,
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            **ATTENTION_NAMES,
            **FUSED_MLP_NAMES,
        },
        turns_part=True,
    ),
    "command-r": Architecture(
        "cohere",
        "CohereForCausalLM",
        {"attn_norm": "input_layernorm", **ATTENTION_NAMES, **HEAD_NORM_NAMES, **MLP_NAMES},
        epsilon=(LAYER_NORM, "layer_norm_eps"),
        fields=COHERE,
    ),
    "cohere2": Architecture(
        "cohere2",
        "Cohere2ForCausalLM",
        {"attn_norm": "input_layernorm", **ATTENTION_NAMES, **MLP_NAMES},
        epsilon=(LAYER_NORM, "layer_norm_eps"),
        fields={**SLIDING, **COHERE},
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        turns_part=True,
        epsilon=(LAYER_NORM, "layer_norm_eps"),
        bias="use_qkv_bias",
    ),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        {**PRE_NORM_NAMES, **ATTENTION_NAMES, "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        adds_one=True,
        turns_part=True,
        epsilon=(LAYER_NORM, "norm_eps"),
    ),
}

CHANGING = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_scale", "residual_scale"),
    *(
        "expert_count",
        "expert_shared_count",
        "expert_shared_feed_forward_length",
        "expert_weights_scale",
        "expert_group_count",
        "leading_dense_block_count",
    ),
    *("swiglu_clamp_exp", "rope.scaling.attn_factor", "rope.dimension_sections"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier"),
    *("attention.temperature_scale", "attention.temperature_length"),
)
"""Fields that make another model: of an architecture that is not known to have one they are refused, unless 0."""
WIDE_SCALES = {"gemma2": 46, "gemma3": 62}
"""How many layers the largest Gemma has, whose scores are scaled as for heads of its width over their number;
others' are by the size of a head.  No field says so: llama.cpp tells them by their layers."""
GEMMA3_LOCAL_THETA = 10000.0
"""Rotary's base in layers with a window, unless rope.freq_base_swa says another."""

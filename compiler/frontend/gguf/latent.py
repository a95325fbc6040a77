"""Models whose keys and values are made of latents, as llama.cpp calls all of them: "deepseek2".

Its files treat a latent and a key's turned part as the one key that all heads share, and so say head_count_kv 1 and
key_length rank + turned; a head's own sizes are under other names.  Older files say those alone, and have kv_b whole.
DeepSeek-AI 2024, arXiv:2405.04434.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.gguf.fields import BY_SOFTMAX, count, way_of_scores
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.kind import (
    EXPERT_SIZES,
    MLP_NAMES,
    PRE_NORM_NAMES,
    ROUTER_NAME,
    ROWS,
    SHARED_EXPERTS_NAMES,
    Architecture,
    Config,
    elsewhere,
)
from llmc.compiler.frontend.gguf.tensors import made
from llmc.compiler.frontend.packed.ggml import numbers
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

WHOLE, KEYS, VALUES = "attn_kv_b", "attn_k_b", "attn_v_b"
NAMES = {
    **PRE_NORM_NAMES,
    **MLP_NAMES,
    **ROUTER_NAME,
    **SHARED_EXPERTS_NAMES,
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    **dict.fromkeys((WHOLE, KEYS, VALUES), "self_attn.kv_b_proj"),
    "attn_output": "self_attn.o_proj",
}
FIELDS = {
    **EXPERT_SIZES,
    "attention.kv_lora_rank": "kv_lora_rank",
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}


def is_by_softmax(file: GgufFile) -> bool:
    """Whether a router's scores are a softmax, as DeepSeek V2's.  Older files do not say, but have what V3 adds."""
    way = way_of_scores(file)
    has_bias = any(".exp_probs_b." in name for name in file.tensors)
    return way == BY_SOFTMAX or (way == 0 and not has_bias and bool(file.fields.get("deepseek2.expert_count")))


def sizes(file: GgufFile, config: Config) -> dict[str, Any]:
    """The sizes of heads, and which layers have experts."""
    turned, n_heads = config["head_dim"], config["num_attention_heads"]
    of_heads = "_mla" if f"{file.architecture}.attention.key_length_mla" in file.fields else ""
    key, value = (count(file, f"attention.{name}_length{of_heads}") for name in ("key", "value"))
    if key <= turned:
        fact = f"keys of {key} numbers, of which {turned} are turned, are not read from GGUF"
        raise LlmcError(fact, place=str(file.path))
    found: dict[str, Any] = {
        "num_key_value_heads": n_heads,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "kv_lora_rank": count(file, "attention.kv_lora_rank"),
        "q_lora_rank": count(file, "attention.q_lora_rank") if "blk.0.attn_q_a.weight" in file.tensors else None,
        "n_group": config.get("n_group") or 1,  # older files have none, and are computed so
        "topk_group": config.get("topk_group") or 1,
    }
    if not file.fields.get("deepseek2.expert_count"):
        found["first_k_dense_replace"] = config["num_hidden_layers"]
        found["n_routed_experts"] = found["num_experts_per_tok"] = 1
    return found


def by_sigmoid(file: GgufFile, config: Config) -> dict[str, Any]:
    """What a file says of DeepSeek V3 and its like."""
    return {**sizes(file, config), "norm_topk_prob": file.fields.get("deepseek2.expert_weights_norm") is True}


def by_softmax(file: GgufFile, config: Config) -> dict[str, Any]:
    """What a file says of DeepSeek V2."""
    if file.fields.get("deepseek2.expert_weights_norm"):
        fact = "experts chosen by softmax, whose weights are made to sum to one, are not read from GGUF"
        raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    found = sizes(file, config)
    return {**found, "topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy"}


def keys_and_values(own: str, keys: StoredTensor, file: GgufFile, config: Config) -> StoredTensor | None:
    """[H (nope + v), rank], each head's keys before its values, of keys [H, rank, nope] and values [H, v, rank]."""
    if keys.name.replace(KEYS, WHOLE) in file.tensors:
        return None
    values = file.tensors.get(keys.name.replace(KEYS, VALUES))
    n_heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
    if values is None or (keys.dims, values.dims) != ((n_heads, rank, nope), (n_heads, v, rank)):
        fact = f"tensor {keys.name!r} has no values beside it, or has the shape {list(keys.dims)}"
        raise LlmcError(fact, place=str(file.path))

    def read() -> Array:
        both = np.concatenate([numbers(keys).swapaxes(1, 2), numbers(values)], axis=1)
        return both.reshape(n_heads * (nope + v), rank)

    return made(own, keys, (n_heads * (nope + v), rank), read, None, values)


DEEPSEEK_V3 = Architecture(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {**NAMES, "exp_probs_b": "mlp.gate.e_score_correction_bias"},
    experts=("mlp.experts", ROWS),
    fields=FIELDS,
    read=("rope.scaling.yarn_log_multiplier",),
    is_latent=True,
    more=by_sigmoid,
    made={KEYS: keys_and_values, VALUES: elsewhere},
)
DEEPSEEK_V2 = Architecture(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    NAMES,
    experts=("mlp.experts", ROWS),
    fields=FIELDS,
    read=("rope.scaling.yarn_log_multiplier",),
    is_latent=True,
    more=by_softmax,
    made={KEYS: keys_and_values, VALUES: elsewhere},
)
"""What a file of "deepseek2" is whose router makes scores by softmax."""

"""Models some of whose layers have a state: Qwen3-Next and Qwen 3.5 with the gated delta rule, LFM2's convolutions.

What llama.cpp's files say in another way than transformers: A itself, not its logarithm; a convolution's taps without
the axis of one; of qwen3next, queries, keys and values of all heads one after another and their gates apart, where
transformers has all four of one key's head together; of qwen35, heads of values in turns, one of each key's head, where
transformers has those of one key's head together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.gguf.fields import BY_SOFTMAX, count, of_layers, way_of_scores
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.kind import (
    ATTENTION_NAMES,
    EXPERT_SIZES,
    HEAD_NORM_NAMES,
    MLP_NAMES,
    ROUTER_NAME,
    ROWS,
    SHARED_EXPERT_NAMES,
    Architecture,
    Config,
    elsewhere,
)
from llmc.compiler.frontend.gguf.tensors import as_it_is, coded_of, made
from llmc.compiler.frontend.packed.ggml import numbers
from llmc.compiler.frontend.packed.tensor import packed_tensor
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

STATE_NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **ATTENTION_NAMES,
    **HEAD_NORM_NAMES,
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
NEXT_NAMES = {
    "ssm_in": "linear_attn.in_proj_qkvz",
    "attn_qkv": "linear_attn.in_proj_qkvz",
    "attn_gate": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
QWEN35_NAMES = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
}
MIXTURE_NAMES = {**ROUTER_NAME, **SHARED_EXPERT_NAMES}
MIXTURE_FIELDS = {**EXPERT_SIZES, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
LFM2_NAMES = {
    **ATTENTION_NAMES,
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
LFM2_MOE_NAMES = {
    **LFM2_NAMES,
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b": "feed_forward.expert_bias",
}
LFM2_OUTSIDE = {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
RECURRENT, INTERVAL = "attention.recurrent_layers", "full_attention_interval"


def delta_rule(file: GgufFile, config: Config) -> dict[str, Any]:
    """The sizes of a state, and which layers have one."""
    n_layers, n_values = config["num_hidden_layers"], count(file, "ssm.time_step_rank")
    n_keys, inner = count(file, "ssm.group_count"), count(file, "ssm.inner_size")
    if n_values % n_keys or inner % n_values:
        fact = f"{n_values} heads of values of {n_keys} keys, {inner} wide together, are no whole number of each"
        raise LlmcError(fact, place=str(file.path))
    has_state = file.fields.get(f"{file.architecture}.{RECURRENT}")
    if has_state is None:
        interval = count(file, INTERVAL, 4)
        has_state = [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if not isinstance(has_state, list) or len(has_state) < n_layers:
        raise LlmcError(f"the file's {file.architecture}.{RECURRENT} is no list of its layers", place=str(file.path))
    return {
        "layer_types": ["linear_attention" if one else "full_attention" for one in has_state[:n_layers]],
        "linear_conv_kernel_dim": count(file, "ssm.conv_kernel"),
        "linear_key_head_dim": count(file, "ssm.state_size"),
        "linear_value_head_dim": inner // n_values,
        "linear_num_key_heads": n_keys,
        "linear_num_value_heads": n_values,
    }


def short_convolutions(file: GgufFile, config: Config) -> dict[str, Any]:
    """Which layers have heads of keys; the others have a convolution."""
    heads = of_layers(file, "attention.head_count_kv", config["num_hidden_layers"])
    return {
        "layer_types": ["full_attention" if one else "conv" for one in heads],
        "conv_L_cache": count(file, "shortconv.l_cache"),
    }


def with_experts(file: GgufFile, config: Config) -> dict[str, Any]:
    """The same, and whether biases are added to scores where experts are chosen."""
    if way_of_scores(file) == BY_SOFTMAX:
        raise LlmcError("experts of lfm2moe that are chosen by softmax are not read from GGUF", place=str(file.path))
    has_bias = any(".exp_probs_b." in name for name in file.tensors)
    return {**short_convolutions(file, config), "use_expert_bias": has_bias}


def plain(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """As it is: a norm that nothing is added to."""
    return as_it_is(own, tensor)


def logarithm(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """A_log of A = -exp(A_log), float32 [heads of values]."""

    def read() -> Array:
        values: Array = np.log(-in_groups(file, numbers(tensor).astype(np.float32), config, 0, 0, 1))
        return values

    return packed_tensor(tensor.dtype, own, tensor.dims, {"codes": tensor}, read, "f32")


def taps(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """[C, 1, taps] of [C, taps]; of the delta rule, channels of values in the order of their rows."""
    n_channels, n_taps = tensor.dims if len(tensor.dims) == 2 else (0, 0)
    before, head = (of_keys(config), config["linear_value_head_dim"]) if "ssm_" in tensor.name else (n_channels, 1)

    def read() -> Array:
        return in_groups(file, numbers(tensor), config, 0, before, head)[:, None]

    return made(own, tensor, (n_channels, 1, n_taps), read)


def of_keys(config: Config) -> int:
    """Rows of queries and keys together."""
    return int(2 * config["linear_num_key_heads"] * config["linear_key_head_dim"])


def in_groups(file: GgufFile, values: Array, config: Config, axis: int, before: int, head: int) -> Array:
    """Heads of values along an axis, behind `before` others, so that those of one key's head lie together."""
    n_keys, n_values = config.get("linear_num_key_heads", 1), config.get("linear_num_value_heads", 1)
    if file.architecture == "qwen3next" or before == values.shape[axis]:
        return values
    first, rest = np.split(values, [before], axis=axis)
    lead, trail = rest.shape[:axis], rest.shape[axis + 1 :]
    turned = rest.reshape(*lead, n_values // n_keys, n_keys, head, *trail).swapaxes(axis, axis + 1)
    return np.concatenate([first, turned.reshape(rest.shape)], axis=axis)


def reordered(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """Rows, or columns of the product behind the state, of heads of values in groups."""
    stem = tensor.name.split(".")[2]
    head = config["linear_value_head_dim"] if stem in ("attn_qkv", "attn_gate", "ssm_out") else 1
    before, axis = of_keys(config) if stem == "attn_qkv" else 0, int(stem == "ssm_out")
    n = before + config["linear_num_value_heads"] * head
    if len(tensor.dims) <= axis or tensor.dims[axis] != n:
        raise LlmcError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}", place=str(file.path))
    coded = coded_of(tensor)
    if axis and coded and coded.group and head % coded.group:  # then other columns would share a scale
        coded = None
    return made(own, tensor, tensor.dims, lambda: in_groups(file, numbers(tensor), config, axis, before, head), coded)


def with_gates(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """[keys' heads (q, k, v, z), K]: of each key's head its query, key, values and gates, of rows [q, k, v] and [z]."""
    gates = file.tensors.get(tensor.name.replace("attn_qkv", "attn_gate"))
    n_keys, value = config["linear_num_key_heads"], config["linear_value_head_dim"]
    n_of_values, n_of_keys = config["linear_num_value_heads"] * value, of_keys(config)
    k = tensor.dims[-1]
    if gates is None or (tensor.dims, gates.dims) != ((n_of_keys + n_of_values, k), (n_of_values, k)):
        fact = f"tensor {tensor.name!r} has no gates beside it, or has the shape {list(tensor.dims)}"
        raise LlmcError(fact, place=str(file.path))

    def read() -> Array:
        rows = np.split(numbers(tensor), [n_of_keys // 2, n_of_keys])
        parts = [part.reshape(n_keys, -1, k) for part in (*rows, numbers(gates))]
        return np.concatenate(parts, axis=1).reshape(-1, k)

    coded = coded_of(tensor, gates)
    return made(own, tensor, (n_of_keys + 2 * n_of_values, k), read, coded, gates)


MADE = {"ssm_a": logarithm, "ssm_conv1d": taps, "ssm_norm": plain}
NEXT_MADE = {**MADE, "attn_qkv": with_gates, "attn_gate": elsewhere}
QWEN35_MADE = {**MADE, **dict.fromkeys((*QWEN35_NAMES, "ssm_dt", "ssm_out"), reordered)}
SECTIONS = "rope.dimension_sections"
"""How images' positions turn heads: those of texts are all the same."""

QWEN3_NEXT = Architecture(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    {**STATE_NAMES, **NEXT_NAMES, **MIXTURE_NAMES},
    adds_one=True,
    experts=("mlp.experts", ROWS),
    turns_part=True,
    fields=MIXTURE_FIELDS,
    settings={"norm_topk_prob": True},
    more=delta_rule,
    made=NEXT_MADE,
)
QWEN35 = Architecture(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    {**STATE_NAMES, **QWEN35_NAMES, **MLP_NAMES},
    adds_one=True,
    turns_part=True,
    read=(SECTIONS,),
    more=delta_rule,
    made=QWEN35_MADE,
)
QWEN35_MOE = Architecture(
    "qwen3_5_moe_text",
    "Qwen3_5MoeForCausalLM",
    {**STATE_NAMES, **QWEN35_NAMES, **MIXTURE_NAMES},
    adds_one=True,
    experts=("mlp.experts", ROWS),
    turns_part=True,
    fields=MIXTURE_FIELDS,
    read=(SECTIONS,),
    more=delta_rule,
    made=QWEN35_MADE,
)
LFM2 = Architecture(
    "lfm2",
    "Lfm2ForCausalLM",
    LFM2_NAMES,
    epsilon=("attention.layer_norm_rms_epsilon", "norm_eps"),
    settings={"block_auto_adjust_ff_dim": False, "conv_bias": False},
    outside=LFM2_OUTSIDE,
    more=short_convolutions,
    made={"shortconv.conv": taps},
)
LFM2_MOE = Architecture(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    LFM2_MOE_NAMES,
    experts=("feed_forward.experts", ROWS),
    epsilon=("attention.layer_norm_rms_epsilon", "norm_eps"),
    fields={
        **EXPERT_SIZES,
        "leading_dense_block_count": "num_dense_layers",
        "expert_weights_scale": "routed_scaling_factor",
    },
    settings={"conv_bias": False, "norm_topk_prob": True},
    outside=LFM2_OUTSIDE,
    more=with_experts,
    made={"shortconv.conv": taps},
)

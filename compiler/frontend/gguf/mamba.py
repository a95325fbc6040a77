"""Models some of whose layers scan as Mamba 2 does: Granite 4, Falcon-H1, Nemotron-H without experts.

What llama.cpp's files say in another way than transformers: A itself, not its logarithm, and a column of it, as of D;
a convolution's taps without the axis of one; a norm's weights by groups; Granite's gates and ups, which are one product
in transformers, apart.  Falcon-H1's multipliers are in its weights.  Dao and Gu 2024, arXiv:2405.21060.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.gguf.fields import count, number, of_layers
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.kind import (
    ATTENTION_NAMES,
    GRANITE,
    MLP_NAMES,
    PRE_NORM_NAMES,
    ROWS,
    Architecture,
    Config,
    elsewhere,
)
from llmc.compiler.frontend.gguf.tensors import as_it_is, coded_of, made
from llmc.compiler.frontend.packed.ggml import numbers
from llmc.compiler.frontend.packed.tensor import packed_tensor
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

SCAN, ATTENTION, MLP = "linear_attention", "full_attention", "mlp"
SSM_NAMES = {
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_dt": "mamba.dt_bias",
    "ssm_a": "mamba.A_log",
    "ssm_d": "mamba.D",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
SHARED = {"ffn_gate": "shared_mlp.input_linear", "ffn_down": "shared_mlp.output_linear"}
SHARED_NAMES = {**SHARED, "ffn_up": SHARED["ffn_gate"]}
"""Granite's MLP of all tokens; beside experts its tensors are called as those of shared ones are."""
GRANITE_NAMES = {
    **PRE_NORM_NAMES,
    **ATTENTION_NAMES,
    **SSM_NAMES,
    **SHARED_NAMES,
    **{f"{name}_shexp": own for name, own in SHARED_NAMES.items()},
    "ffn_gate_inp": "block_sparse_moe.router",
}
GRANITE_FIELDS = {
    **GRANITE,
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}
FALCON_NAMES = {
    **ATTENTION_NAMES,
    **SSM_NAMES,
    **{name: own.replace("mlp", "feed_forward") for name, own in MLP_NAMES.items()},
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_ff_layernorm.weight",  # which the file's name does not say
}
NEMOTRON_NAMES = {
    **{name: own.replace("self_attn", "mixer") for name, own in ATTENTION_NAMES.items()},
    **{name: own.replace("mamba", "mixer") for name, own in SSM_NAMES.items()},
    "attn_norm": "norm",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
}
ROPE = "rope.scaling.finetuned"
"""In these files: whether there is any rotary."""
NO_MULTIPLIERS = {
    **dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier"), 1.0),
    **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0),
    **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
    "mlp_multipliers": [1.0] * 2,
    "ssm_multipliers": [1.0] * 5,
}


def scan(file: GgufFile) -> dict[str, Any]:
    """The sizes of a scan; heads are as wide as together they are wide over their number."""
    inner, n_heads, n_groups = (count(file, f"ssm.{name}") for name in ("inner_size", "time_step_rank", "group_count"))
    if inner % n_heads or n_heads % n_groups:
        fact = f"{n_heads} heads in {n_groups} groups, {inner} wide together, are no whole number of each"
        raise LlmcError(fact, place=str(file.path))
    return {
        "mamba_n_heads": n_heads,
        "mamba_d_head": inner // n_heads,
        "mamba_n_groups": n_groups,
        "mamba_d_state": count(file, "ssm.state_size"),
        "mamba_d_conv": count(file, "ssm.conv_kernel"),
        "mamba_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in file.tensors),
    }


def of_granite(file: GgufFile, config: Config) -> dict[str, Any]:
    """Which layers scan, whether there are experts and rotary; a factor that is not said, or is 0, changes nothing."""
    found, hidden = scan(file), config["hidden_size"]
    inner = found["mamba_n_heads"] * found["mamba_d_head"]
    if inner % hidden:
        fact = f"a scan {inner} wide, of a model {hidden} wide, is not read from GGUF"
        raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    heads = of_layers(file, "attention.head_count_kv", config["num_hidden_layers"])
    no_more = {"attention_multiplier": config["head_dim"] ** -0.5, "num_local_experts": 0, "num_experts_per_tok": 0}
    no_more |= dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    return {
        **found,
        **{name: config.get(name) or value for name, value in no_more.items()},
        "mamba_expand": inner // hidden,
        "layer_types": [ATTENTION if one else SCAN for one in heads],
        "shared_intermediate_size": config.get("shared_intermediate_size") or config["intermediate_size"],
        "position_embedding_type": "nope" if file.fields.get(f"{file.architecture}.{ROPE}") is False else "rope",
    }


def of_falcon(file: GgufFile, config: Config) -> dict[str, Any]:
    """Both kinds in each layer.  Embeddings and the last product have factors of their own, and so are two tensors."""
    if config["tie_word_embeddings"]:
        fact = "the file lacks the tensor 'output.weight', and does not say by what logits are multiplied"
        raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    found = scan(file)
    return {
        **found,
        "mamba_d_ssm": found["mamba_n_heads"] * found["mamba_d_head"],
        "mamba_rms_norm": any(name.endswith(".ssm_norm.weight") for name in file.tensors),
    }


def of_nemotron(file: GgufFile, config: Config) -> dict[str, Any]:
    """Of which one kind each layer is: heads of keys, rows of an MLP, or neither.  Either epsilon is that of norms."""
    n_layers, found = config["num_hidden_layers"], scan(file)
    heads, rows = (of_layers(file, name, n_layers) for name in ("attention.head_count_kv", "feed_forward_length"))
    if any(head and row for head, row in zip(heads, rows, strict=True)):
        fact = "a layer that has both heads of keys and an MLP is not read from GGUF"
        raise LlmcError(fact, place=str(file.path))
    return {
        "layers_block_type": [
            ATTENTION if head else MLP if row else SCAN for head, row in zip(heads, rows, strict=True)
        ],
        "layer_norm_epsilon": number(file, "attention.layer_norm_rms_epsilon", config["layer_norm_epsilon"]),
        "mamba_num_heads": found["mamba_n_heads"],
        "mamba_head_dim": found["mamba_d_head"],
        "n_groups": found["mamba_n_groups"],
        "ssm_state_size": found["mamba_d_state"],
        "conv_kernel": found["mamba_d_conv"],
        "use_conv_bias": found["mamba_conv_bias"],
    }


def flat(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """[n] of a column, or of groups."""
    return made(own, tensor, (int(np.prod(tensor.dims)),), lambda: numbers(tensor).reshape(-1))


def logarithm(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """A_log of A = -exp(A_log), float32 [heads] of a column."""

    def read() -> Array:
        values: Array = np.log(-numbers(tensor).astype(np.float32).reshape(-1))
        return values

    return packed_tensor(tensor.dtype, own, (int(np.prod(tensor.dims)),), {"codes": tensor}, read, "f32")


def taps(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """[C, 1, taps] of [C, taps]; a bias [C] as it is."""
    if len(tensor.dims) == 1:
        return as_it_is(own, tensor)
    n_channels, *n_taps = tensor.dims
    return made(own, tensor, (n_channels, 1, *n_taps), lambda: numbers(tensor)[:, None])


def gate_up(own: str, gates: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """[2N, K] of gates [N, K] and ups [N, K]."""
    ups = file.tensors.get(gates.name.replace("ffn_gate", "ffn_up"))
    if ups is None or ups.dims != gates.dims:
        raise LlmcError(f"tensor {gates.name!r} has no other of its shape for up", place=str(file.path))
    coded = coded_of(gates, ups)
    n, *rest = gates.dims
    return made(own, gates, (2 * n, *rest), lambda: np.concatenate([numbers(gates), numbers(ups)]), coded, ups)


MADE = {"ssm_a": logarithm, "ssm_d": flat, "ssm_norm": flat, "ssm_conv1d": taps}
UPS = ("ffn_up", "ffn_up_shexp")

GRANITE_HYBRID = Architecture(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    GRANITE_NAMES,
    turns_neighbours=True,
    experts=("block_sparse_moe.experts", ROWS),
    fields=GRANITE_FIELDS,
    more=of_granite,
    made={**MADE, **dict.fromkeys(("ffn_gate", "ffn_gate_shexp"), gate_up), **dict.fromkeys(UPS, elsewhere)},
)
FALCON_H1 = Architecture(
    "falcon_h1",
    "FalconH1ForCausalLM",
    FALCON_NAMES,
    settings={**NO_MULTIPLIERS, "mamba_norm_before_gate": False},
    outside={"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head"},
    more=of_falcon,
    made=MADE,
)
NEMOTRON_H = Architecture(
    "nemotron_h",
    "NemotronHForCausalLM",
    NEMOTRON_NAMES,
    turns_neighbours=True,
    epsilon=("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    outside={"token_embd": "model.embeddings", "output_norm": "model.norm_f", "output": "lm_head"},
    more=of_nemotron,
    made=MADE,
)

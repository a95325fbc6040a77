"""What is known of one of llama.cpp's architectures, and the names that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.gguf.file import GgufFile

Config: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = Callable[[GgufFile, Config], dict[str, Any]]
"""What else the configuration says, of the file and of what it says already."""
Make: TypeAlias = Callable[[str, StoredTensor, GgufFile, Config], StoredTensor | None]
"""transformers' tensor of this name, of one of the file's; None where it is made of another one, with this."""
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
RMS_EPSILON = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
SLIDING = {"attention.sliding_window": "sliding_window"}
ATTENTION_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
PRE_NORM_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
MLP_NAMES = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ROUTER_NAME = {"ffn_gate_inp": "mlp.gate"}
FUSED_MLP_NAMES = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
SANDWICH_NAMES = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYER_NAMES = {**PRE_NORM_NAMES, **ATTENTION_NAMES, **MLP_NAMES}
"""What Llama's layers call their modules."""
SHARED_EXPERT_NAMES = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
SHARED_EXPERTS_NAMES = {f"{name}_shexp": own.replace("mlp", "mlp.shared_experts") for name, own in MLP_NAMES.items()}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
EXPERT_SIZES = {**EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
ROWS, COLUMNS, ALTERNATING = "rows", "columns", "alternating columns"
"""How transformers keeps a layer's experts: gates' rows and then up's; the same transposed; or gates and up in turn."""


def nothing(file: GgufFile, config: Config) -> dict[str, Any]:
    """No more."""
    return {}


def elsewhere(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> None:
    """It is read with another tensor."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    model_type, name: transformers'.  layers: its modules by the names of a file's tensors.  turns_neighbours: rows of
    queries and keys are in another order.  adds_one: weights of norms are kept as 1 + w.  experts: where a layer's
    experts are, and how they are kept there; None: there are none.  turns_part: heads may be turned in part.
    epsilon: the file's name for that of norms, and transformers'.  fields: the same of other numbers.  read: what else
    of CHANGING is read.  bias: what says that queries, keys and values have biases.  settings: the same for all models.
    outside: the modules outside of layers.  is_latent: keys and values are made of latents, and a head's size is that
    of its turned part.  stack: what its layers stand in.  attends: whether any layer has heads, or an MLP.  more: what
    follows from other numbers.  made: tensors that do not lie in the file as they are.
    """

    model_type: str
    name: str
    layers: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    turns_neighbours: bool = False
    adds_one: bool = False
    experts: tuple[str, str] | None = None
    turns_part: bool = False
    epsilon: tuple[str, str] = RMS_EPSILON
    fields: Mapping[str, str] = field(default_factory=dict)
    read: tuple[str, ...] = ()
    bias: str = "attention_bias"
    settings: Mapping[str, Any] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=lambda: NAMES)
    is_latent: bool = False
    stack: str = "model.layers"
    attends: bool = True
    more: Fields = nothing
    made: Mapping[str, Make] = field(default_factory=dict)

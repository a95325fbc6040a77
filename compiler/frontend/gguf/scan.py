"""Models that scan as Mamba 1 does: Mamba itself, Falcon Mamba, Jamba.

What llama.cpp's files say in another way than transformers: A itself, not its logarithm; a convolution's taps without
the axis of one; which layers of Jamba attend, and which have experts, by their heads and tensors, where transformers
has a period and an offset of each.  Falcon Mamba is a file of "mamba" that says so.  Gu and Dao 2023, arXiv:2312.00752.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.gguf.fields import count, of_layers
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.kind import ATTENTION_NAMES, MLP_NAMES, ROWS, Architecture, Config
from llmc.compiler.frontend.gguf.mamba import taps
from llmc.compiler.frontend.packed.ggml import numbers
from llmc.compiler.frontend.packed.tensor import packed_tensor
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

MIXER = {
    "ssm_in": "in_proj",
    "ssm_conv1d": "conv1d",
    "ssm_x": "x_proj",
    "ssm_dt": "dt_proj",
    "ssm_a": "A_log",
    "ssm_d": "D",
    "ssm_out": "out_proj",
    "ssm_dt_norm": "dt_layernorm",
    "ssm_b_norm": "b_layernorm",
    "ssm_c_norm": "c_layernorm",
}
EPSILON = ("attention.layer_norm_rms_epsilon", "layer_norm_epsilon")
OUTSIDE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
WITH_NORMS = "mamba.ssm.dt_b_c_rms"
"""What says that a file is of Falcon Mamba."""
PERIODS = {"attn_layer": "attention", "expert_layer": "experts"}
"""How transformers names periods and offsets, and whose they are."""


def scan(file: GgufFile) -> dict[str, int]:
    """The sizes of a scan, by Mamba's names for them."""
    inner, hidden = count(file, "ssm.inner_size"), count(file, "embedding_length")
    if inner % hidden:
        fact = f"a scan {inner} wide, of a model {hidden} wide, is not read from GGUF"
        raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    return {
        "expand": inner // hidden,
        "intermediate_size": inner,
        "state_size": count(file, "ssm.state_size"),
        "conv_kernel": count(file, "ssm.conv_kernel"),
        "time_step_rank": count(file, "ssm.time_step_rank"),
    }


def of_mamba(file: GgufFile, config: Config) -> dict[str, Any]:
    """The sizes of a scan alone."""
    return {**scan(file), "use_conv_bias": has_bias(file)}


def of_jamba(file: GgufFile, config: Config) -> dict[str, Any]:
    """Which layers attend, and which have experts."""
    sizes, n_layers = scan(file), config["num_hidden_layers"]
    heads = of_layers(file, "attention.head_count_kv", n_layers)
    experts = [f"blk.{layer}.ffn_gate_inp.weight" in file.tensors for layer in range(n_layers)]
    found: dict[str, Any] = {
        "mamba_expand": sizes["expand"],
        "mamba_d_state": sizes["state_size"],
        "mamba_d_conv": sizes["conv_kernel"],
        "mamba_dt_rank": sizes["time_step_rank"],
        "mamba_conv_bias": has_bias(file),
        "mamba_proj_bias": False,
    }
    for (name, what), has in zip(PERIODS.items(), ([n > 0 for n in heads], experts), strict=True):
        offset, period = turns(file, has, what)
        found |= {f"{name}_offset": offset, f"{name}_period": period}
    return found if any(experts) else {**found, "num_experts": 1, "num_experts_per_tok": 1}


def turns(file: GgufFile, has: list[bool], what: str) -> tuple[int, int]:
    """(the first layer that has something, every how many layers have); every layer, where none has: of one expert."""
    layers = [layer for layer, one in enumerate(has) if one] or [0]
    period = layers[1] - layers[0] if len(layers) > 1 else len(has)
    if any(has) and has != [layer % period == layers[0] for layer in range(len(has))]:
        which = ", ".join(map(str, layers[:8]))
        raise LlmcError(f"layers {which} with {what} are no even distance apart", place=str(file.path))
    return layers[0], period


def has_bias(file: GgufFile) -> bool:
    return any(name.endswith(".ssm_conv1d.bias") for name in file.tensors)


def logarithm(own: str, tensor: StoredTensor, file: GgufFile, config: Config) -> StoredTensor:
    """A_log of A = -exp(A_log), float32 [C, N]."""

    def read() -> Array:
        values: Array = np.log(-numbers(tensor).astype(np.float32))
        return values

    return packed_tensor(tensor.dtype, own, tensor.dims, {"codes": tensor}, read, "f32")


MADE = {"ssm_a": logarithm, "ssm_conv1d": taps}
MAMBA_NAMES = {"attn_norm": "norm"} | {name: f"mixer.{own}" for name, own in MIXER.items() if "norm" not in name}

MAMBA = Architecture(
    "mamba",
    "MambaForCausalLM",
    MAMBA_NAMES,
    stack="backbone.layers",
    attends=False,
    epsilon=EPSILON,
    outside=OUTSIDE,
    more=of_mamba,
    made=MADE,
)
FALCON_MAMBA = replace(MAMBA, model_type="falcon_mamba", name="FalconMambaForCausalLM")
JAMBA = Architecture(
    "jamba",
    "JambaForCausalLM",
    {
        **ATTENTION_NAMES,
        **{name: f"mamba.{own}" for name, own in MIXER.items()},
        **{name: own.replace("mlp", "feed_forward") for name, own in MLP_NAMES.items()},
        "attn_norm": "input_layernorm",
        "ffn_norm": "pre_ff_layernorm",
        "ffn_gate_inp": "feed_forward.router",
    },
    experts=("feed_forward.experts", ROWS),
    fields={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
    outside={"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head"},
    more=of_jamba,
    made=MADE,
)

"""A model out of a GGUF file: configuration, weights and tokenizer as they are in a folder of Hugging Face's.

Architectures are those of ARCHITECTURES.  Tensors have names of their own (NAMES); of `llama` the rows of queries' and
keys' weights lie so that neighbours are turned together, and go back to where a head's halves are.  What a file says
and is not known here is refused, by name: a number that is left out gives another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import pi
from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import DTYPES, StoredTensor
from llmc.compiler.frontend.gguf_file import GgufFile
from llmc.compiler.frontend.packed.ggml import BY_NAME, numbers
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.packed.tensor import packed_tensor
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError, shortened


@dataclass(frozen=True)
class Architecture:
    """model_type, name: transformers'.  turns_neighbours: whether rows of queries and keys are in another order."""

    model_type: str
    name: str
    turns_neighbours: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", turns_neighbours=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3 stretches its positions by, but for the factor."""
SMALL = {"Q8_0": "int8", "Q6_K": "int8"}


def config_of(file: GgufFile) -> dict[str, Any]:
    """The fields of config.json that the file's stand for."""
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        fact = f"GGUF files of the architecture {file.architecture!r} are not read"
        raise LlmcError(fact, place=str(file.path), hint=f"of {', '.join(ARCHITECTURES)} they are; or give a folder")
    if file.fields.get(f"{file.architecture}.expert_count"):
        raise LlmcError("GGUF files with experts are not read", place=str(file.path), hint="give the model's folder")
    n_heads = _count(file, "attention.head_count")
    hidden = _count(file, "embedding_length")
    head_dim = _count(file, "attention.key_length", hidden // n_heads)
    sizes = [_count(file, name, head_dim) for name in ("attention.value_length", "rope.dimension_count")]
    if sizes != [head_dim] * 2:
        raise LlmcError("heads of several sizes, or turned in part, are not read from GGUF", place=str(file.path))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LlmcError("the file lacks the tensor 'token_embd.weight'", place=str(file.path))
    if embedding.dims[1:] != (hidden,):
        fact = f"tensor 'token_embd.weight' has the shape {list(embedding.dims)}, of a model {hidden} wide"
        raise LlmcError(fact, place=str(file.path))
    ends = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "model_type": known.model_type,
        "architectures": [known.name],
        "vocab_size": embedding.dims[0],
        "hidden_size": hidden,
        "intermediate_size": _count(file, "feed_forward_length"),
        "num_hidden_layers": _count(file, "block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _count(file, "attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(file, "context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon", 1e-5),
        "rope_parameters": _rope(file, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file.fields.get("tokenizer.ggml.bos_token_id")),
        "eos_token_id": list(dict.fromkeys(end for end in ends if _token(end) is not None)) or None,
    }


def _token(value: object) -> int | None:
    return value if type(value) is int else None


def _count(file: GgufFile, name: str, default: int | None = None) -> int:
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) is not int or value < 1:
        raise LlmcError(f"the file's {file.architecture}.{name} is no count", place=str(file.path))
    return value


def _number(file: GgufFile, name: str, default: float) -> float:
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise LlmcError(f"the file's {file.architecture}.{name} is no number", place=str(file.path))
    # float32 as it lies in the file; the shortest decimal of it is what its makers wrote
    return float(str(np.float32(value)))


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """How positions turn heads."""
    theta = _number(file, "rope.freq_base", 10000.0)
    kind = file.fields.get(f"{file.architecture}.rope.scaling.type", "none")
    frequencies = file.tensors.get(FREQUENCIES)
    if frequencies is not None:
        return _llama3(file, frequencies, theta, head_dim)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _number(file, "rope.scaling.factor", 1.0)}
    if kind != "none":
        raise LlmcError(f"positions scaled by {shortened(kind)!r} are not read from GGUF", place=str(file.path))
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(file: GgufFile, frequencies: StoredTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's way, if it is what these divisors of each frequency come from."""
    if frequencies.dims != (head_dim // 2,) or frequencies.dtype not in DTYPES:
        raise LlmcError(f"tensor {FREQUENCIES!r} has the shape {list(frequencies.dims)}", place=str(file.path))
    divisors = frequencies.read().astype(np.float64)
    factor = float(divisors.max())
    waves = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((LLAMA3["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise LlmcError(f"tensor {FREQUENCIES!r} scales positions otherwise than Llama 3 does", place=str(file.path))
    return {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), **LLAMA3}


def checkpoint_of(file: GgufFile, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The file's tensors under transformers' names.  Reads none.  Raises LlmcError for one that no model here has."""
    turned = ARCHITECTURES[file.architecture].turns_neighbours
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        stem, _, end = name.rpartition(".")
        layer = LAYER.fullmatch(name)
        if name == FREQUENCIES:
            continue
        if layer and layer[2] in LAYER_NAMES:
            own = f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"
        elif stem in NAMES and end == "weight":
            own = f"{NAMES[stem]}.weight"
        else:
            raise LlmcError(f"the model has no tensor for the file's {name!r}", place=str(file.path))
        n_heads = heads.get(layer[2], 0) if layer and turned else 0
        if n_heads and tensor.dims[0] % (2 * n_heads):
            raise LlmcError(f"tensor {name!r} has the shape {list(tensor.dims)}", place=str(file.path))
        if n_heads or tensor.dtype not in DTYPES:
            dtype = DTYPES.get(tensor.dtype, "bf16")
            read = partial(in_halves, tensor, n_heads) if n_heads else partial(numbers, tensor)
            coded = BY_NAME[tensor.dtype].coded
            found[own] = packed_tensor(tensor.dtype, own, tensor.dims, {"codes": tensor}, read, dtype, coded)
        else:
            found[own] = tensor
    return found


def in_halves(tensor: StoredTensor, n_heads: int) -> Array:
    """The rows of each head [d] in the order 0, 2, 4, …, 1, 3, 5, …: halves, of rows that lie as pairs."""
    values = numbers(tensor)
    pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def packing_of_file(file: GgufFile) -> Packing:
    """How the file keeps most of its weights."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.n_bytes
    most = max(sizes, key=lambda name: sizes[name])
    said = f"GGUF, most in {most}" if len(sizes) > 1 else f"GGUF, {most}"
    return Packing(said, dict, SMALL.get(most, "int4") if BY_NAME[most].read else "")

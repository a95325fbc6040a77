"""A model out of a GGUF file: configuration, weights and tokenizer as they are in a folder of Hugging Face's.

Architectures are those of gguf_architectures.py.  Tensors have names of their own; what a file says and is not known
here is refused, by name: a number that is left out gives another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import pi
from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import DTYPES, StoredTensor
from llmc.compiler.frontend.gguf_architectures import (
    ARCHITECTURES,
    CHANGING,
    GEMMA3_LOCAL_THETA,
    MIXTRAL,
    WIDE_SCALES,
    Architecture,
)
from llmc.compiler.frontend.gguf_file import GgufFile
from llmc.compiler.frontend.gguf_tensors import (
    DOWNS,
    GATES,
    UPS,
    as_it_is,
    down_of_experts,
    gate_up_of_experts,
    in_halves,
    less_one,
    one_row,
)
from llmc.compiler.frontend.packed.ggml import BY_NAME
from llmc.compiler.frontend.packed.packing import Packing
from llmc.runtime.errors import LlmcError, shortened

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3 stretches its positions by, but for the factor."""
LLAMA4_WITHOUT_NORM = 128
"""Experts of the Llama 4 whose queries and keys are not normalised, Maverick."""
PATTERN = "attention.sliding_window_pattern"
SMALL = {"Q8_0": "int8", "Q6_K": "int8", "MXFP4": "mxfp4"}


def architecture_of(file: GgufFile) -> Architecture:
    """What is known of the file's architecture.  Refuses one that is not, and fields that make another model."""
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        fact = f"GGUF files of the architecture {file.architecture!r} are not read"
        raise LlmcError(fact, place=str(file.path), hint=f"of {', '.join(ARCHITECTURES)} they are; or give a folder")
    if file.architecture == "llama" and file.fields.get("llama.expert_count"):
        known = MIXTRAL
    for name in CHANGING:
        if file.fields.get(f"{file.architecture}.{name}") and name not in (*known.fields, *known.read):
            fact = f"the file says {file.architecture}.{name}, which is not read"
            raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    return known


def config_of(file: GgufFile) -> dict[str, Any]:
    """The fields of config.json that the file's stand for."""
    known = architecture_of(file)
    n_heads = _count(file, "attention.head_count")
    hidden = _count(file, "embedding_length")
    head_dim = _count(file, "attention.key_length", hidden // n_heads)
    value_dim, turned = (_count(file, name, head_dim) for name in ("attention.value_length", "rope.dimension_count"))
    if value_dim != head_dim or turned > head_dim or (turned < head_dim and not known.turns_part):
        raise LlmcError("heads of several sizes, or turned in part, are not read from GGUF", place=str(file.path))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LlmcError("the file lacks the tensor 'token_embd.weight'", place=str(file.path))
    if embedding.dims[1:] != (hidden,):
        fact = f"tensor 'token_embd.weight' has the shape {list(embedding.dims)}, of a model {hidden} wide"
        raise LlmcError(fact, place=str(file.path))
    ends = [file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    rope = _rope(file, turned)
    config = {
        "model_type": known.model_type,
        "architectures": [known.name],
        "vocab_size": embedding.dims[0],
        "hidden_size": hidden,
        "intermediate_size": _count(file, "feed_forward_length"),
        "num_hidden_layers": _count(file, "block_count") - _n_ahead(file),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _count(file, "attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(file, "context_length"),
        known.epsilon[1]: _number(file, known.epsilon[0], 1e-5),
        "rope_parameters": {**rope, "partial_rotary_factor": turned / head_dim} if known.turns_part else rope,
        known.bias: "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file.fields.get("tokenizer.ggml.bos_token_id")),
        "pad_token_id": _token(file.fields.get("tokenizer.ggml.padding_token_id")),
        "eos_token_id": list(dict.fromkeys(end for end in ends if _token(end) is not None)) or None,
    }
    return {**config, **known.settings, **_own_fields(file, known), **_worked_out(file, config)}


def _n_ahead(file: GgufFile) -> int:
    """Layers behind the others that guess at further tokens, and are left out."""
    value = file.fields.get(f"{file.architecture}.nextn_predict_layers", 0)
    if type(value) is not int or not 0 <= value < _count(file, "block_count"):
        raise LlmcError(f"the file's {file.architecture}.nextn_predict_layers is no count", place=str(file.path))
    return value


def _own_fields(file: GgufFile, known: Architecture) -> dict[str, Any]:
    """What the architecture has of numbers besides; a window of 0 is none."""
    fields: dict[str, Any] = {}
    for name, own in known.fields.items():
        value = file.fields.get(f"{file.architecture}.{name}")
        if type(value) is bool:
            fields[own] = value
        elif value is not None:
            number = _number(file, name, 0.0, least=0.0)
            fields[own] = int(number) if type(value) is int else number
    return {own: None if own == "sliding_window" and not value else value for own, value in fields.items()}


def _worked_out(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from others, or from which tensors there are."""
    found: dict[str, Any] = {}
    kind, head_dim, rope = file.architecture, config["head_dim"], config["rope_parameters"]
    if kind in WIDE_SCALES:
        is_wide = config["num_hidden_layers"] == WIDE_SCALES[kind]
        found["query_pre_attn_scalar"] = config["hidden_size"] / config["num_attention_heads"] if is_wide else head_dim
    if kind == "gemma3":
        theta = _number(file, "rope.freq_base_swa", GEMMA3_LOCAL_THETA)
        local = {"rope_type": "default", "rope_theta": theta}
        found["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if kind in ("gemma3", "exaone4", "cohere2", "gpt-oss") and (
        types := layer_types(file, config["num_hidden_layers"])
    ):
        found["layer_types"] = types
    if kind == "llama4":
        found["use_qk_norm"] = file.fields.get("llama4.expert_count") != LLAMA4_WITHOUT_NORM
    if kind == "glm4moe":
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors
    if kind == "command-r":
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors
    if kind == "stablelm":
        found["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in file.tensors
    return found


def layer_types(file: GgufFile, n_layers: int) -> list[str]:
    """Which layers have a window, if the file says so: of each layer, or after how many comes one without."""
    pattern = file.fields.get(f"{file.architecture}.{PATTERN}")
    if type(pattern) is int and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(n_layers)]
    if pattern is None and file.architecture == "exaone4":
        pattern = [bool(file.fields.get("exaone4.attention.sliding_window"))] * n_layers
        pattern[3::4] = [False] * len(pattern[3::4])
    if pattern is None:
        return []
    if not isinstance(pattern, list) or len(pattern) < n_layers:
        raise LlmcError(f"the file's {file.architecture}.{PATTERN} is no list of its layers", place=str(file.path))
    return ["sliding_attention" if one else "full_attention" for one in pattern[:n_layers]]


def _token(value: object) -> int | None:
    return value if type(value) is int else None


def _count(file: GgufFile, name: str, default: int | None = None) -> int:
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) is not int or value < 1:
        raise LlmcError(f"the file's {file.architecture}.{name} is no count", place=str(file.path))
    return value


def _number(file: GgufFile, name: str, default: float, least: float = 1e-12) -> float:
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) not in (int, float) or not least <= value < 1e12:
        raise LlmcError(f"the file's {file.architecture}.{name} is no number", place=str(file.path))
    # float32 as it lies in the file; the shortest decimal of it is what its makers wrote
    return float(str(np.float32(value)))


def _rope(file: GgufFile, turned: int) -> dict[str, Any]:
    """How positions turn so many elements of a head."""
    theta = _number(file, "rope.freq_base", 10000.0)
    kind = file.fields.get(f"{file.architecture}.rope.scaling.type", "none")
    frequencies = file.tensors.get(FREQUENCIES)
    if frequencies is not None:
        return _llama3(file, frequencies, theta, turned)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _number(file, "rope.scaling.factor", 1.0)}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn(file)}
    if kind != "none":
        raise LlmcError(f"positions scaled by {shortened(kind)!r} are not read from GGUF", place=str(file.path))
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(file: GgufFile) -> dict[str, Any]:
    found: dict[str, Any] = {
        "factor": _number(file, "rope.scaling.factor", 1.0),
        "original_max_position_embeddings": _count(file, "rope.scaling.original_context_length"),
        "beta_fast": _number(file, "rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": _number(file, "rope.scaling.yarn_beta_slow", 1.0),
    }
    if file.architecture == "gpt-oss":
        found["truncate"] = False
    if file.architecture == "mistral3":
        found["mscale"] = found["mscale_all_dim"] = _number(file, "rope.scaling.yarn_log_multiplier", 1.0)
        found["llama_4_scaling_beta"] = _number(file, "attention.temperature_scale", 0.1)
    return found


def _llama3(file: GgufFile, frequencies: StoredTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's way, if it is what these divisors of each frequency come from."""
    if frequencies.dims != (head_dim // 2,) or frequencies.dtype not in DTYPES:
        raise LlmcError(f"tensor {FREQUENCIES!r} has the shape {list(frequencies.dims)}", place=str(file.path))
    divisors = frequencies.read().astype(np.float64)
    factor = float(divisors.max())
    waves = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    before = LLAMA3["original_max_position_embeddings"]
    if file.architecture == "llama4":  # whose step between the two is one
        wanted = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": before}
        if np.array_equal(divisors, np.where(waves > before, factor, 1)):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), **wanted}
    smooth = np.clip((before / waves - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise LlmcError(f"tensor {FREQUENCIES!r} scales positions otherwise than Llama 3 does", place=str(file.path))
    return {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), **LLAMA3}


def checkpoint_of(file: GgufFile, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The file's tensors under transformers' names.  Reads none.  Raises LlmcError for one that no model here has."""
    known, n_layers = architecture_of(file), config["num_hidden_layers"]
    ahead = tuple(f"blk.{n_layers + layer}." for layer in range(_n_ahead(file)))
    found: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        if name == FREQUENCIES:
            continue
        layer = LAYER.fullmatch(name)
        if name.startswith(ahead):
            continue
        own = _name(name, layer, known)
        if own is None:
            raise LlmcError(f"the model has no tensor for the file's {name!r}", place=str(file.path))
        made = _tensor(file, tensor, own, layer[2] if layer else "", known, config)
        if made is not None:
            found[own] = made
    return found


def _name(name: str, layer: re.Match[str] | None, known: Architecture) -> str | None:
    """What transformers calls a tensor of the file; None: nothing."""
    if layer is None:
        stem, _, end = name.rpartition(".")
        return f"{NAMES[stem]}.{end}" if stem in NAMES and end in ("weight", "bias") else None
    number, stem, end = layer.groups()
    if known.experts and stem in (GATES, UPS, DOWNS):
        part = "down_proj" if stem == DOWNS else "gate_up_proj"
        return f"model.layers.{number}.{known.experts[0]}.{part}{'_bias' * (end == 'bias')}"
    if stem not in known.layers:
        return None
    own = f"model.layers.{number}.{known.layers[stem]}"
    return own if own.endswith((".sinks", "_bias")) else f"{own}.{end}"


def _tensor(
    file: GgufFile, tensor: StoredTensor, own: str, stem: str, known: Architecture, config: Mapping[str, Any]
) -> StoredTensor | None:
    """The tensor as transformers has it; None for that of up, which is read with its gate's."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if stem == UPS:
        return None
    if stem == GATES and known.experts:
        other = file.tensors.get(tensor.name.replace(GATES, UPS))
        if other is None or other.dims != tensor.dims:
            raise LlmcError(f"tensor {tensor.name!r} has no other of its shape for up", place=str(file.path))
        return gate_up_of_experts(own, tensor, other, known.experts[1])
    if stem == DOWNS and known.experts:
        return down_of_experts(own, tensor, known.experts[1])
    if stem in heads and known.turns_neighbours:
        if tensor.dims[0] % (2 * heads[stem]):
            raise LlmcError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}", place=str(file.path))
        return in_halves(own, tensor, heads[stem])
    if known.adds_one and own.endswith("norm.weight"):
        return less_one(own, tensor)
    if own.endswith("shared_expert_gate.weight") and len(tensor.dims) == 1:
        return one_row(own, tensor)
    return as_it_is(own, tensor)


def check_used(file: GgufFile, checkpoint: Mapping[str, StoredTensor], used: Iterable[str]) -> None:
    """Refuse a tensor that the model has no place for: it would be another model without it."""
    left = next((tensor for name, tensor in checkpoint.items() if name not in set(used)), None)
    if left is not None:
        raise LlmcError(f"the model has no tensor for the file's {left.parts[0].name!r}", place=str(file.path))


def packing_of_file(file: GgufFile) -> Packing:
    """How the file keeps most of its weights."""
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.n_bytes
    most = max(sizes, key=lambda name: sizes[name])
    said = f"GGUF, most in {most}" if len(sizes) > 1 else f"GGUF, {most}"
    return Packing(said, dict, SMALL.get(most, "int4") if BY_NAME[most].read else "")

"""A model out of a GGUF file: configuration, weights and tokenizer as they are in a folder of Hugging Face's.

Architectures are those of architectures.py.  Tensors have names of their own; what a file says and is not known
here is refused, by name: a number that is left out gives another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.config import check_layers
from llmc.compiler.frontend.gguf.architectures import (
    ARCHITECTURES,
    CHANGING,
    GEMMA3_LOCAL_THETA,
    MIXTRAL,
    WIDE_SCALES,
)
from llmc.compiler.frontend.gguf.fields import count, count_of_layers, number
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.gguf.kind import ROWS, Architecture
from llmc.compiler.frontend.gguf.latent import DEEPSEEK_V2, is_by_softmax
from llmc.compiler.frontend.gguf.rope import FREQUENCIES, rope_of
from llmc.compiler.frontend.gguf.scan import FALCON_MAMBA, WITH_NORMS
from llmc.compiler.frontend.gguf.tensors import (
    DOWNS,
    GATES,
    GATES_UPS,
    UPS,
    as_it_is,
    down_of_experts,
    gate_up_of_experts,
    in_halves,
    less_one,
    one_row,
)
from llmc.compiler.frontend.gguf.text import ends_of
from llmc.compiler.frontend.packed.ggml import BY_NAME
from llmc.compiler.frontend.packed.packing import Packing
from llmc.runtime.errors import LlmcError

LAYER = re.compile(r"blk\.(\d+)\.([\w.]+?)(?:\.(weight|bias))?")
BARE = (".sinks", "_bias", ".A_log", ".D", ".weight")
"""How transformers' names end of what is no module's weight or bias, or where the file's does not say it."""
LLAMA4_WITHOUT_NORM = 128
"""Experts of the Llama 4 whose queries and keys are not normalised, Maverick."""
OF_EXPERTS = "expert_feed_forward_length"
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
    if file.architecture == "deepseek2" and is_by_softmax(file):
        known = DEEPSEEK_V2
    if file.fields.get(WITH_NORMS) is True:
        known = FALCON_MAMBA
    for name in CHANGING:
        if file.fields.get(f"{file.architecture}.{name}") and name not in (*known.fields, *known.read):
            fact = f"the file says {file.architecture}.{name}, which is not read"
            raise LlmcError(fact, place=str(file.path), hint="give the model's folder")
    if file.fields.get(f"{file.architecture}.attention.causal") is False:
        fact = "the file is of a model whose attention is not causal, which is not read from GGUF"
        raise LlmcError(fact, place=str(file.path))
    return known


def config_of(file: GgufFile) -> dict[str, Any]:
    """The fields of config.json that the file's stand for."""
    known = architecture_of(file)
    check_layers(n_layers := count(file, "block_count"), str(file.path))
    n_heads = count(file, "attention.head_count") if known.attends else 1
    hidden = count(file, "embedding_length")
    head_dim, turned = _head(file, known, hidden // n_heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise LlmcError("the file lacks the tensor 'token_embd.weight'", place=str(file.path))
    if embedding.dims[1:] != (hidden,):
        fact = f"tensor 'token_embd.weight' has the shape {list(embedding.dims)}, of a model {hidden} wide"
        raise LlmcError(fact, place=str(file.path))
    rope = rope_of(file, turned)
    config = {
        "model_type": known.model_type,
        "architectures": [known.name],
        "vocab_size": embedding.dims[0],
        "hidden_size": hidden,
        "intermediate_size": _rows_of_mlp(file) if known.attends else 0,
        "num_hidden_layers": n_layers - _n_ahead(file),
        "num_attention_heads": n_heads,
        "num_key_value_heads": count_of_layers(file, "attention.head_count_kv", n_heads) if known.attends else 1,
        "head_dim": head_dim,
        "max_position_embeddings": count(file, "context_length"),
        known.epsilon[1]: number(file, known.epsilon[0], 1e-5),
        "rope_parameters": {**rope, "partial_rotary_factor": turned / head_dim} if known.turns_part else rope,
        known.bias: "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file.fields.get("tokenizer.ggml.bos_token_id")),
        "pad_token_id": _token(file.fields.get("tokenizer.ggml.padding_token_id")),
        "eos_token_id": ends_of(file) or None,
    }
    config |= {**known.settings, **_own_fields(file, known)}
    return {**config, **_worked_out(file, config), **known.more(file, config)}


def _rows_of_mlp(file: GgufFile) -> int:
    return count_of_layers(file, "feed_forward_length", file.fields.get(f"{file.architecture}.{OF_EXPERTS}"))


def _head(file: GgufFile, known: Architecture, default: int) -> tuple[int, int]:
    """The size of a head, and how much of it positions turn."""
    if known.is_latent:
        turned = count(file, "rope.dimension_count")
        return turned, turned
    head_dim = count(file, "attention.key_length", default)
    value_dim, turned = (count(file, name, head_dim) for name in ("attention.value_length", "rope.dimension_count"))
    if value_dim != head_dim or turned > head_dim or (turned < head_dim and not known.turns_part):
        raise LlmcError("heads of several sizes, or turned in part, are not read from GGUF", place=str(file.path))
    return head_dim, turned


def _n_ahead(file: GgufFile) -> int:
    """Layers behind the others that guess at further tokens, and are left out."""
    value = file.fields.get(f"{file.architecture}.nextn_predict_layers", 0)
    if type(value) is not int or not 0 <= value < count(file, "block_count"):
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
            found = number(file, name, 0.0, least=0.0)
            fields[own] = int(found) if type(value) is int else found
    return {own: None if own == "sliding_window" and not value else value for own, value in fields.items()}


def _worked_out(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from others, or from which tensors there are."""
    found: dict[str, Any] = {}
    kind, head_dim, rope = file.architecture, config["head_dim"], config["rope_parameters"]
    if kind in WIDE_SCALES:
        is_wide = config["num_hidden_layers"] == WIDE_SCALES[kind]
        found["query_pre_attn_scalar"] = config["hidden_size"] / config["num_attention_heads"] if is_wide else head_dim
    if kind == "gemma3":
        theta = number(file, "rope.freq_base_swa", GEMMA3_LOCAL_THETA)
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
        outside = known.outside
        return f"{outside[stem]}.{end}" if stem in outside and end in ("weight", "bias") else None
    number, stem, end = layer.groups()
    if known.experts and stem in (GATES, UPS, GATES_UPS, DOWNS):
        part = "down_proj" if stem == DOWNS else "gate_up_proj"
        return f"{known.stack}.{number}.{known.experts[0]}.{part}{'_bias' * (end == 'bias')}"
    if stem not in known.layers:
        return None
    own = f"{known.stack}.{number}.{known.layers[stem]}"
    if own.endswith(BARE):
        return own
    return f"{own}.{end}" if end else None


def _tensor(
    file: GgufFile, tensor: StoredTensor, own: str, stem: str, known: Architecture, config: Mapping[str, Any]
) -> StoredTensor | None:
    """The tensor as transformers has it; None for one that is read with another, as up with its gate."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if stem in known.made:
        return known.made[stem](own, tensor, file, config)
    if stem == UPS:
        return None
    if stem == GATES and known.experts:
        other = file.tensors.get(tensor.name.replace(GATES, UPS))
        if other is None or other.dims != tensor.dims:
            raise LlmcError(f"tensor {tensor.name!r} has no other of its shape for up", place=str(file.path))
        if len(tensor.dims) < 2:
            raise LlmcError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}", place=str(file.path))
        return gate_up_of_experts(own, tensor, other, known.experts[1])
    if stem == GATES_UPS and known.experts and known.experts[1] != ROWS:
        raise LlmcError(f"tensor {tensor.name!r}, of gates and ups in one, is not read here", place=str(file.path))
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

"""What a point needs in memory, and what there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmc.bench.chart.request import READ_TOKENS, Task

DTYPE_BYTES = {"f32": 4, "bf16": 2}
PAGE_TOKENS = 64
SPARE_BYTES = 2 << 30
"""Left to the rest of the machine; mapped weights are evicted, and read again, well before memory is full."""
LLMC_BESIDE_BYTES = 150 << 20
"""Python, NumPy and the runtime."""
TORCH_BESIDE_BYTES = 1200 << 20
"""PyTorch, transformers, activations."""


def llmc_needs(manifest: dict[str, Any], task: Task) -> int:
    """Bytes resident while llmc does a task: weights, buffers, pages of the KV cache."""
    memory, cache = manifest["memory"], manifest["kv_cache"]
    return int(memory["weight_bytes"] + memory["arena_bytes"] + LLMC_BESIDE_BYTES) + int(
        kv_tokens(task) * cache["bytes_per_token"]
    )


def kv_tokens(task: Task) -> int:
    """Room for a task in llmc's cache: its sequences in whole pages, and the one they were copied from."""
    sequences = max(task.batch, 1) * (-(-task.length // PAGE_TOKENS) + 1)
    return (sequences + READ_TOKENS // PAGE_TOKENS + 1) * PAGE_TOKENS


def torch_needs(manifest: dict[str, Any], task: Task, dtype: str) -> int:
    """Bytes for a model in PyTorch and the like: every weight, a cache that is replaced layer by layer as it grows."""
    model = manifest["model"]
    width = DTYPE_BYTES[dtype]
    tokens = max(task.batch, 1) * task.length + READ_TOKENS
    cache = tokens * kv_elements(model) * width
    return int(n_weights(manifest) * width + cache * (1 + 2 / model["n_layers"]) + TORCH_BESIDE_BYTES)


def kv_elements(model: dict[str, Any]) -> int:
    """Elements of a token's keys and values, in all layers."""
    config = model["config"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * model["n_layers"] * (config.get("num_key_value_heads") or heads) * head_dim)


def attention_width(model: dict[str, Any]) -> int:
    """Elements of all queries of a token, in all layers."""
    config = model["config"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(model["n_layers"] * config["num_attention_heads"] * head_dim)


def head_weights(model: dict[str, Any]) -> int:
    """Weights of the product that gives logits."""
    config = model["config"]
    return int(model["n_vocab"] * (config.get("word_embed_proj_dim") or config["hidden_size"]))


def n_weights(manifest: dict[str, Any]) -> int:
    """About how many weights a model has."""
    return int(8 * manifest["memory"]["weight_bytes"] / bits(manifest))


def bits(manifest: dict[str, Any]) -> float:
    """Bits of most weights of an artifact, scales included."""
    quant = manifest.get("quant")
    if quant:
        return {"int8": 8.1, "int4": 4.5, "fp8": 8.1}.get(quant["name"], 8.0)
    return 8 * DTYPE_BYTES[manifest["model"]["dtype"]]


def step_bytes(manifest: dict[str, Any]) -> int:
    """Bytes of the weights that a step may read: all but tables from which it takes a row a token."""
    tables = [w for w in manifest["weights"] if "row-major" in w["layout"] and w["bytes"] > 1 << 20]
    return int(manifest["memory"]["weight_bytes"] - sum(w["bytes"] for w in tables))


def experts(manifest: dict[str, Any]) -> dict[str, float]:
    """For a mixture, the bytes of step_bytes that are experts', and the share of the experts that a token chooses."""
    n_bytes = sum(w["bytes"] for w in manifest["weights"] if re.match(r"\d+ times ", w["layout"]))
    if not n_bytes:
        return {}
    call = next(schedule["call"] for schedule in manifest["schedules"] if "Experts" in schedule["op"])
    (chosen, n_experts), *_ = re.findall(r"i64\[\d+,(\d+)\].*?\[(\d+),\d+,\d+\]", call)
    return {"expert_bytes": n_bytes, "expert_share": int(chosen) / int(n_experts)}


def weight_sizes(manifest: dict[str, Any]) -> dict[str, float]:
    """step_bytes, and what `experts` says."""
    return {"step_bytes": step_bytes(manifest), **experts(manifest)}


def read_bytes(model: Mapping[str, Any], n_tokens: int) -> float:
    """Bytes of the weights that a step of so many tokens reads, if they choose their experts by chance.  model:
    weight_sizes."""
    unread = (1 - model.get("expert_share", 1.0)) ** n_tokens
    return float(model["step_bytes"] - unread * model.get("expert_bytes", 0))

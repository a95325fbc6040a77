"""Files of "deepseek2": latents, as llama.cpp's converter lays them out now and did before, are read as they were.

Layout: conversion/deepseek.py of llama.cpp, and what src/models/deepseek2.cpp reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmc.compiler.frontend.config import parse_config
from llmc.compiler.frontend.gguf.file import open_gguf
from llmc.compiler.frontend.gguf.kind import NAMES
from llmc.compiler.frontend.gguf.latent import NAMES as LATENT_NAMES
from llmc.compiler.frontend.gguf.model import checkpoint_of, config_of
from llmc.runtime.errors import LlmcError
from tests.compiler.test_gguf import F32, Q8_0, Tensors, blocks_of, write

Array = np.ndarray[Any, Any]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "V2 Lite": (
        "deepseek_v2",
        {"q_lora_rank": None, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "V2": ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
    "V3": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "rope_parameters": YARN | {"mscale": 1, "mscale_all_dim": 1}},
    ),
    "GLM-4.7-Flash": ("glm4_moe_lite", {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-6}),
}
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}


def small(kind: str) -> tuple[Any, Any]:
    """A model and its configuration; no weight of it is one or zero throughout."""
    family, more = MODELS[kind]
    config = CONFIG_MAPPING[family](**SIZES | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for each in model.state_dict().values():
            each.copy_(torch.randn(each.shape) / 4)
    return model, config


def tensors_of(name: str, values: Array, config: Any, *, is_old: bool) -> dict[str, Array]:
    """The file's tensors for one of transformers'."""
    stem, _, end = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return {f"{next(own for own, other in NAMES.items() if other == stem)}.{end}": values}
    _, _, number, place = name.split(".", 3)
    layer = f"blk.{number}"
    if place == "mlp.experts.gate_up_proj":
        gates, ups = np.split(values, 2, axis=1)
        return {f"{layer}.ffn_gate_exps.weight": gates, f"{layer}.ffn_up_exps.weight": ups}
    if place == "mlp.experts.down_proj":
        return {f"{layer}.ffn_down_exps.weight": values}
    if place == "mlp.gate.e_score_correction_bias":
        return {f"{layer}.exp_probs_b.bias": values}
    if place == "self_attn.kv_b_proj.weight" and not is_old:
        heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, of_values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        return {f"{layer}.attn_k_b.weight": keys.swapaxes(1, 2), f"{layer}.attn_v_b.weight": of_values}
    own = next(own for own, other in LATENT_NAMES.items() if other == place.removesuffix(".weight"))
    return {f"{layer}.{own}.weight": values}


def fields_of(config: Any, *, is_old: bool) -> dict[str, Any]:
    found = {name: getattr(config, own, None) for name, own in FIELDS.items()}
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    found |= {"attention.key_length": key, "attention.value_length": value}
    found["attention.head_count_kv"] = config.num_attention_heads
    if not is_old:
        found |= {"attention.key_length_mla": key, "attention.value_length_mla": value, "attention.head_count_kv": 1}
        found["attention.key_length"] = config.kv_lora_rank + config.qk_rope_head_dim
        found["attention.value_length"] = config.kv_lora_rank
    found["leading_dense_block_count"] = 1
    if getattr(config, "norm_topk_prob", False):
        found["expert_weights_norm"] = True
    rope = config.rope_parameters
    found["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    said = {f"deepseek2.{name}": value for name, value in found.items() if value is not None}
    return {"general.architecture": "deepseek2", **said}


def as_file(path: Path, kind: str, changed: dict[str, Any], left: str = "", *, is_old: bool = False) -> Path:
    """The small model as a file, all of it but the tensors that are `left` out."""
    model, config = small(kind)
    tensors: Tensors = {}
    for name, values in model.state_dict().items():
        for own, each in tensors_of(name, values.numpy(), config, is_old=is_old).items():
            tensors[own] = (each.shape, F32, np.ascontiguousarray(each, np.float32).tobytes())
    fields = fields_of(config, is_old=is_old) | changed
    kept = {name: each for name, each in tensors.items() if not left or left not in name}
    return write(path, {name: value for name, value in fields.items() if value is not None}, kept)


@pytest.mark.parametrize("is_old", [False, True], ids=["split", "whole"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_file_has_the_logits_of_its_model(kind: str, is_old: bool, tmp_path: Path) -> None:
    model, _ = small(kind)
    file = open_gguf(as_file(tmp_path / "m.gguf", kind, {}, is_old=is_old))
    fields = config_of(file)
    found = checkpoint_of(file, fields)
    read = AutoModelForCausalLM.from_config(parse_config(fields, "m.gguf")).eval()
    read.load_state_dict({name: torch.from_numpy(np.array(tensor.read())) for name, tensor in found.items()})
    ids = torch.arange(36).reshape(2, 18)
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)


def test_halves_of_a_weight_may_be_in_blocks(tmp_path: Path) -> None:
    """Those of keys lie along another axis than their weight's rows, and no code of them is kept."""
    file = open_gguf(as_file(tmp_path / "m.gguf", "V3", {}))
    config = config_of(file)
    rank, wanted = SIZES["kv_lora_rank"], []
    for name, axes in (("blk.0.attn_k_b.weight", (0, 2, 1)), ("blk.0.attn_v_b.weight", (0, 1, 2))):
        blocks, numbers = blocks_of(np.array(file.tensors[name].read()), Q8_0)
        one: Tensors = {name: (numbers.shape, Q8_0, blocks)}
        file.tensors.update(open_gguf(write(tmp_path / f"{name}.gguf", {}, one)).tensors)
        wanted.append(numbers.transpose(axes))
    found = checkpoint_of(file, config)["model.layers.0.self_attn.kv_b_proj.weight"]
    assert found.coded is None
    np.testing.assert_array_equal(found.read(), np.concatenate(wanted, axis=1).reshape(-1, rank))


@pytest.mark.parametrize(
    ("kind", "changed", "left", "said"),
    [
        ("V3", {"deepseek2.expert_gating_func": 4}, "", "chosen in the way 4"),
        ("V2", {"deepseek2.expert_weights_norm": True}, "", "made to sum to one"),
        ("V3", {"deepseek2.rope.dimension_count": 40}, "", "keys of 40 numbers, of which 40 are turned"),
        ("V3", {"deepseek2.attention.temperature_scale": 0.1}, "", "temperature_scale, which is not read"),
        ("V3", {}, "attn_v_b", "'blk.0.attn_k_b.weight' has no values beside it"),
    ],
)
def test_what_makes_another_model_is_refused(
    kind: str, changed: dict[str, Any], left: str, said: str, tmp_path: Path
) -> None:
    file = open_gguf(as_file(tmp_path / "m.gguf", kind, changed, left))
    with pytest.raises(LlmcError, match=said):
        checkpoint_of(file, config_of(file))


def test_a_model_without_experts_has_layers_of_one_kind(tmp_path: Path) -> None:
    none = {"deepseek2.expert_count": None, "deepseek2.expert_used_count": None, "deepseek2.expert_shared_count": None}
    config = config_of(open_gguf(as_file(tmp_path / "m.gguf", "V3", none, "exp")))
    assert (config["model_type"], config["first_k_dense_replace"]) == ("deepseek_v3", 2)


def test_vocabularies_of_deepseek_and_kimi_are_split_as_their_own_tokenizers_do() -> None:
    from tokenizers import Tokenizer, models

    from llmc.compiler.frontend.gguf.text import SPLITS, split_by

    found = {}
    for name in ("deepseek-llm", "deepseek-v3", "kimi-k2"):
        tokenizer = Tokenizer(models.BPE())
        split_by(tokenizer, SPLITS[name])
        found[name] = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab's 1234\n  ,x")]
    assert found == {
        "deepseek-llm": ["ab", "'", "s", "Ġ", "1234", "Ċ", "Ġ", "Ġ,", "x"],
        "deepseek-v3": ["ab", "'s", "Ġ", "123", "4", "Ċ", "Ġ", "Ġ,", "x"],
        "kimi-k2": ["ab's", "Ġ", "123", "4", "Ċ", "Ġ", "Ġ,", "x"],
    }

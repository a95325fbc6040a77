"""Files of models whose layers have a state, laid out as llama.cpp's converter does, are read as they were.

Layout: conversion/qwen.py and conversion/lfm2.py of llama.cpp, and what src/models/qwen3next.cpp reads of older files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmc.compiler.frontend.config import parse_config
from llmc.compiler.frontend.gguf.architectures import ARCHITECTURES
from llmc.compiler.frontend.gguf.file import GgufFile, open_gguf
from llmc.compiler.frontend.gguf.model import checkpoint_of, config_of
from llmc.compiler.frontend.packed.ggml import KINDS
from llmc.runtime.errors import LlmcError
from tests.compiler.test_gguf import F32, Q8_0, Tensors, blocks_of, write
from tests.compiler.test_gguf_architectures import COUNTED, experts_of

Array = np.ndarray[Any, Any]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
KEYS, VALUES, KEY, VALUE = 2, 6, 8, 12
STATES = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": KEYS,
    "linear_num_value_heads": VALUES,
    "linear_key_head_dim": KEY,
    "linear_value_head_dim": VALUE,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3next": {**STATES, **MIXTURE},
    "qwen35": STATES,
    "qwen35moe": {**STATES, **MIXTURE},
    "lfm2moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "tie_word_embeddings": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8, "tie_word_embeddings": False},
}


def small(kind: str) -> tuple[Any, Any]:
    """A model and its configuration; no weight of it is one or zero throughout."""
    config = CONFIG_MAPPING[ARCHITECTURES[kind].model_type](**SIZES | MODELS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for each in model.state_dict().values():
            each.copy_(torch.randn(each.shape) / 4)
    return model, config


def in_turns(values: Array, head: int, axis: int = 0) -> Array:
    """Heads of values: the first of each key's head, the second of each, and so on."""
    heads, each = np.split(values, VALUES, axis), VALUES // KEYS
    assert heads[0].shape[axis] == head
    return np.concatenate([heads[key * each + one] for one in range(each) for key in range(KEYS)], axis)


def behind_keys(values: Array) -> Array:
    keys = 2 * KEYS * KEY
    return np.concatenate([values[:keys], in_turns(values[keys:], VALUE)])


QWEN35: dict[str, Callable[[Array], Array]] = {
    "in_proj_qkv.weight": behind_keys,
    "conv1d.weight": behind_keys,
    "in_proj_z.weight": lambda values: in_turns(values, VALUE),
    "in_proj_a.weight": lambda values: in_turns(values, 1),
    "in_proj_b.weight": lambda values: in_turns(values, 1),
    "A_log": lambda values: in_turns(values, 1),
    "dt_bias": lambda values: in_turns(values, 1),
    "out_proj.weight": lambda values: in_turns(values, VALUE, 1),
}


def tensors_of(name: str, values: Array, kind: str, *, is_old: bool) -> dict[str, Array]:
    """The file's tensors for one of transformers'."""
    known = ARCHITECTURES[kind]
    values = values + (known.adds_one and name.endswith("norm.weight") and "linear_attn" not in name)
    stem, _, end = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return {f"{next(own for own, other in known.outside.items() if other == stem)}.{end}": values}
    _, _, number, module, place = name.split(".", 4)
    layer = f"blk.{number}"
    if place.startswith("experts."):
        return experts_of(layer, place.removeprefix("experts."), values, "rows")
    if module == "linear_attn" and kind != "qwen3next":
        values = QWEN35[place](values) if place in QWEN35 else values
    if place == "in_proj_qkvz.weight" and not is_old:
        heads = np.split(values.reshape(KEYS, -1, SIZES["hidden_size"]), [KEY, 2 * KEY, 2 * KEY + 3 * VALUE], axis=1)
        q, k, v, z = (part.reshape(-1, SIZES["hidden_size"]) for part in heads)
        return {f"{layer}.attn_qkv.weight": np.concatenate([q, k, v]), f"{layer}.attn_gate.weight": z}
    if place == "A_log":
        return {f"{layer}.ssm_a": -np.exp(values)}
    if place == "dt_bias":
        return {f"{layer}.ssm_dt.bias": values}
    if place == "expert_bias":
        return {f"{layer}.exp_probs_b.bias": values}
    values = values[:, 0] if "conv" in place and values.ndim == 3 else values
    values = values[0] if place == "shared_expert_gate.weight" else values
    whole = f"{module}.{place}".removesuffix(".weight")
    return {f"{layer}.{next(own for own, other in known.layers.items() if other == whole)}.weight": values}


def fields_of(kind: str, config: Any) -> dict[str, Any]:
    known = ARCHITECTURES[kind]
    found = {name: getattr(config, own, None) for name, own in {**COUNTED, **known.fields}.items()}
    found |= {known.epsilon[0]: float(getattr(config, known.epsilon[1]))}
    found |= {"rope.freq_base": float(config.rope_parameters["rope_theta"])}
    if kind.startswith("lfm2"):
        found |= {"shortconv.l_cache": config.conv_L_cache, "attention.head_count_kv": [0, 2, 0]}
        found["feed_forward_length"] = 16 if kind == "lfm2" else 24  # one is two thirds of the configuration's
    else:
        found |= {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 4}
        found |= {"ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": KEY, "ssm.group_count": KEYS}
        found |= {"ssm.time_step_rank": VALUES, "ssm.inner_size": VALUES * VALUE}
        found["full_attention_interval"] = 4
        found["attention.recurrent_layers"] = [1, 0, 1]
    if kind.startswith("qwen35"):
        found["rope.dimension_sections"] = [11, 11, 10, 0]
    if kind == "qwen35moe":  # whose configuration has no size of layers without experts
        del found["feed_forward_length"]
    said = {f"{kind}.{name}": value for name, value in found.items() if value is not None}
    return {"general.architecture": kind, **said}


def as_file(
    path: Path, kind: str, changed: dict[str, Any] | None = None, left: str = "", *, is_old: bool = False
) -> GgufFile:
    """The small model as a file, all of it but the tensors that are `left` out."""
    model, config = small(kind)
    tensors: Tensors = {}
    for name, values in model.state_dict().items():
        for own, each in tensors_of(name, values.numpy(), kind, is_old=is_old).items():
            if not left or left not in own:
                tensors[own] = (each.shape, F32, np.ascontiguousarray(each, np.float32).tobytes())
    fields = fields_of(kind, config) | (changed or {})
    return open_gguf(write(path, {name: value for name, value in fields.items() if value is not None}, tensors))


@pytest.mark.parametrize(("kind", "is_old"), [*((kind, False) for kind in MODELS), ("qwen3next", True)])
def test_a_file_has_the_logits_of_its_model(kind: str, is_old: bool, tmp_path: Path) -> None:
    model, _ = small(kind)
    file = as_file(tmp_path / "m.gguf", kind, is_old=is_old)
    fields = config_of(file)
    found = checkpoint_of(file, fields)
    read = AutoModelForCausalLM.from_config(parse_config(fields, "m.gguf")).eval()
    read.load_state_dict({name: torch.from_numpy(np.array(tensor.read())) for name, tensor in found.items()})
    for name, values in model.state_dict().items():
        np.testing.assert_allclose(read.state_dict()[name], values, rtol=1e-6, atol=2e-7, err_msg=name)
    ids = torch.arange(36).reshape(2, 18)
    with torch.no_grad():
        np.testing.assert_allclose(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def in_blocks(file: GgufFile, name: str, folder: Path) -> Array:
    """Give the file one of its tensors in blocks; its numbers then."""
    blocks, numbers = blocks_of(np.array(file.tensors[name].read()), Q8_0)
    file.tensors.update(open_gguf(write(folder / name, {}, {name: (numbers.shape, Q8_0, blocks)})).tensors)
    return numbers


def test_rows_in_blocks_keep_their_codes(tmp_path: Path) -> None:
    file = as_file(tmp_path / "m.gguf", "qwen3next")
    rows, gates = (in_blocks(file, f"blk.0.{name}.weight", tmp_path) for name in ("attn_qkv", "attn_gate"))
    found = checkpoint_of(file, config_of(file))["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert found.coded == KINDS[Q8_0].coded
    keys, each = 2 * KEYS * KEY, VALUES // KEYS * VALUE
    second = [rows[KEY : 2 * KEY], rows[KEYS * KEY + KEY : keys], rows[keys + each :], gates[each:]]
    np.testing.assert_array_equal(found.read()[2 * KEY + 2 * each :], np.concatenate(second))


@pytest.mark.parametrize(("value", "keeps"), [(32, True), (16, False)])
def test_columns_keep_their_codes_where_heads_are_whole_groups(value: int, keeps: bool, tmp_path: Path) -> None:
    """Columns of a product are reordered by heads: within a group of 32 they would share the scale of others."""
    changed = {"qwen35.ssm.time_step_rank": 4, "qwen35.ssm.inner_size": 4 * value}
    file = as_file(tmp_path / "m.gguf", "qwen35", changed)
    out = np.random.default_rng(0).standard_normal((32, 4 * value)).astype(np.float32)
    blocks, numbers = blocks_of(out, Q8_0)
    name = "blk.0.ssm_out.weight"
    file.tensors.clear()
    file.tensors.update(open_gguf(write(tmp_path / "n.gguf", {}, {name: (out.shape, Q8_0, blocks)})).tensors)
    config = {**STATES, "linear_num_value_heads": 4, "linear_value_head_dim": value}
    found = ARCHITECTURES["qwen35"].made["ssm_out"]("o", file.tensors[name], file, config)
    assert found is not None
    assert (found.coded is not None) == keeps
    wanted = numbers.reshape(32, 2, KEYS, value).swapaxes(1, 2).reshape(out.shape)
    np.testing.assert_array_equal(found.read(), wanted)


@pytest.mark.parametrize(
    ("kind", "changed", "left", "said"),
    [
        ("qwen35", {"qwen35.ssm.time_step_rank": 5}, "", "5 heads of values of 2 keys, 72 wide together"),
        ("qwen35", {"qwen35.ssm.state_size": None}, "", "ssm.state_size is no count"),
        ("qwen35", {"qwen35.attention.recurrent_layers": [1, 0]}, "", "recurrent_layers is no list of its layers"),
        ("qwen35", {"qwen35.ssm.inner_size": 48}, "", "'blk.0.ssm_out.weight' has the shape"),
        ("qwen3next", {}, "attn_gate", "'blk.0.attn_qkv.weight' has no gates beside it"),
        ("lfm2", {"lfm2.attention.head_count_kv": [0, 2]}, "", "head_count_kv is no list of its layers"),
        ("lfm2", {"lfm2.attention.head_count_kv": [4, 2, 0]}, "", "head_count_kv is no count"),
        ("lfm2moe", {"lfm2moe.expert_gating_func": 1}, "", "lfm2moe that are chosen by softmax"),
        ("lfm2", {"lfm2.shortconv.l_cache": None}, "", "l_cache is no count"),
    ],
)
def test_what_makes_another_model_is_refused(
    kind: str, changed: dict[str, Any], left: str, said: str, tmp_path: Path
) -> None:
    file = as_file(tmp_path / "m.gguf", kind, changed, left)
    with pytest.raises(LlmcError, match=said):
        checkpoint_of(file, config_of(file))


def test_layers_with_a_state_are_counted_where_no_list_says_them(tmp_path: Path) -> None:
    changed = {"qwen35.attention.recurrent_layers": None, "qwen35.full_attention_interval": 2}
    config = config_of(as_file(tmp_path / "m.gguf", "qwen35", changed))
    assert config["layer_types"] == ["linear_attention", "full_attention", "linear_attention"]

"""Files of models that scan as Mamba 2 does, laid out as llama.cpp's converter does, are read as they were.

Layout: conversion/granite.py, falcon_h1.py, nemotron.py and mamba.py of llama.cpp.
"""

from __future__ import annotations

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
HEADS, GROUPS, HEAD, STATE = 4, 2, 16, 8
INNER = HEADS * HEAD
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
SCAN = {"mamba_n_heads": HEADS, "mamba_n_groups": GROUPS, "mamba_d_head": HEAD, "mamba_d_state": STATE}
GRANITE: dict[str, Any] = {
    **SCAN,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 24,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "nope",
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
FALCON: dict[str, Any] = {
    **SCAN,
    "num_hidden_layers": 2,
    "mamba_d_ssm": INNER,
    "head_dim": 8,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 4.0,
    "key_multiplier": 0.25,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.75,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.5,
    "mlp_multipliers": [0.75, 0.5],
    "ssm_multipliers": [0.5, 0.75, 1.5, 2.0, 0.25],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granitehybrid", GRANITE),
    "granite with experts": ("granitehybrid", {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite with rotary": ("granitehybrid", {**GRANITE, "position_embedding_type": "rope"}),
    "falcon": ("falcon-h1", FALCON),
    "falcon without norms": ("falcon-h1", {**FALCON, "mamba_rms_norm": False}),
    "nemotron": (
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "mamba_num_heads": HEADS,
            "mamba_head_dim": HEAD,
            "n_groups": GROUPS,
            "ssm_state_size": STATE,
            "head_dim": 8,
            "layer_norm_epsilon": 1e-3,
        },
    ),
}


def small(model: str) -> tuple[Any, Any]:
    """A model and its configuration; no weight of it is one or zero throughout."""
    kind, sizes = MODELS[model]
    config = CONFIG_MAPPING[ARCHITECTURES[kind].model_type](**SIZES | sizes)
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for each in found.state_dict().values():
            each.copy_(torch.randn(each.shape) / 4)
    return found, config


def in_pairs(values: Array, n_heads: int) -> Array:
    return values.reshape(n_heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


def multiplied(name: str, values: Array) -> Array:
    """A weight of Falcon-H1 by its factors."""
    parts = np.repeat(FALCON["ssm_multipliers"], [INNER, INNER, GROUPS * STATE, GROUPS * STATE, HEADS])
    factors = {
        "lm_head": 0.5,
        "embed_tokens": 4.0,
        "q_proj": 1.5,
        "k_proj": 1.5 * 0.25,
        "v_proj": 1.5,
        "o_proj": 0.75,
        "gate_proj": 0.75,
        "down_proj": 0.5,
        "mamba.out_proj": 0.5,
        "mamba.in_proj": 1.25 * parts[:, None],
    }
    factor = next((value for own, value in factors.items() if name.endswith(f"{own}.weight")), 1.0)
    return np.asarray(values * factor, np.float32)


def tensors_of(name: str, values: Array, kind: str, config: Any) -> dict[str, Array]:
    """The file's tensors for one of transformers'."""
    known = ARCHITECTURES[kind]
    values = multiplied(name, values) if kind == "falcon-h1" else values
    stem, _, end = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return {f"{next(own for own, other in known.outside.items() if other == stem)}.{end}": values}
    _, _, number, place = name.split(".", 3)
    layer, part = f"blk.{number}", place.rpartition(".")[0]
    if "experts." in place:
        return experts_of(layer, place.rpartition(".")[2], values, "rows")
    if place.startswith("shared_mlp."):
        shared = "_shexp" * bool(config.num_local_experts)
        if "output" in place:
            return {f"{layer}.ffn_down{shared}.weight": values}
        return dict(
            zip((f"{layer}.ffn_{one}{shared}.weight" for one in ("gate", "up")), np.split(values, 2), strict=True)
        )
    if place.endswith(".A_log"):
        return {f"{layer}.ssm_a": -np.exp(values)[:, None]}
    if place.endswith(".D"):
        return {f"{layer}.ssm_d": values[:, None]}
    if place.endswith(".dt_bias"):
        return {f"{layer}.ssm_dt.bias": values}
    if place == "pre_ff_layernorm.weight":
        return {f"{layer}.ffn_norm": values}
    if place.endswith("conv1d.weight"):
        values = values[:, 0]
    if place in ("mamba.norm.weight", "mixer.norm.weight"):
        values = values.reshape(GROUPS, -1)
    if known.turns_neighbours and part.endswith(("q_proj", "k_proj")):
        values = in_pairs(values, 4 if part.endswith("q_proj") else 2)
    return {f"{layer}.{next(own for own, other in known.layers.items() if other == part)}.{end}": values}


def fields_of(kind: str, config: Any) -> dict[str, Any]:
    known = ARCHITECTURES[kind]
    found = {name: getattr(config, own, None) for name, own in {**COUNTED, **known.fields}.items()}
    found |= {known.epsilon[0]: float(getattr(config, known.epsilon[1]))}
    found |= {"ssm.conv_kernel": 4, "ssm.state_size": STATE, "ssm.group_count": GROUPS}
    found |= {"ssm.time_step_rank": HEADS, "ssm.inner_size": INNER}
    if kind != "falcon-h1":
        found["rope.scaling.finetuned"] = getattr(config, "position_embedding_type", "nope") == "rope"
        found["attention.head_count_kv"] = [0, 2, 0]
    if kind == "nemotron_h":
        found["feed_forward_length"] = [0, 0, 24]
    said = {f"{kind}.{name}": value for name, value in found.items() if value is not None}
    return {"general.architecture": kind, **said}


def as_file(path: Path, model: str, changed: dict[str, Any] | None = None, left: str = "") -> GgufFile:
    """The small model as a file, all of it but the tensors that are `left` out."""
    found, config = small(model)
    kind, tensors = MODELS[model][0], Tensors()
    for name, values in found.state_dict().items():
        for own, each in tensors_of(name, values.numpy(), kind, config).items():
            if not left or left not in own:
                tensors[own] = (each.shape, F32, np.ascontiguousarray(each, np.float32).tobytes())
    fields = fields_of(kind, config) | {f"{kind}.{name}": value for name, value in (changed or {}).items()}
    return open_gguf(write(path, {name: value for name, value in fields.items() if value is not None}, tensors))


def read_of(file: GgufFile) -> Any:
    """transformers' model of the file."""
    fields = config_of(file)
    model = AutoModelForCausalLM.from_config(parse_config(fields, "m.gguf")).eval()
    found = checkpoint_of(file, fields)
    model.load_state_dict({name: torch.from_numpy(np.array(tensor.read())) for name, tensor in found.items()})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_logits_of_its_model(name: str, tmp_path: Path) -> None:
    model, _ = small(name)
    read = read_of(as_file(tmp_path / "m.gguf", name))
    if MODELS[name][0] != "falcon-h1":  # whose factors are in its weights
        for own, values in model.state_dict().items():
            np.testing.assert_allclose(read.state_dict()[own], values, rtol=1e-6, atol=2e-7, err_msg=own)
    ids = torch.arange(36).reshape(2, 18)
    with torch.no_grad():
        np.testing.assert_allclose(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("type_of_ups", [Q8_0, F32])
def test_gates_and_ups_keep_their_codes_where_both_have_them(type_of_ups: int, tmp_path: Path) -> None:
    file, numbers = as_file(tmp_path / "m.gguf", "granite"), []
    for name, kind in (("blk.0.ffn_gate.weight", Q8_0), ("blk.0.ffn_up.weight", type_of_ups)):
        blocks, values = blocks_of(np.array(file.tensors[name].read()), kind)
        file.tensors.update(open_gguf(write(tmp_path / name, {}, {name: (values.shape, kind, blocks)})).tensors)
        numbers.append(values)
    found = checkpoint_of(file, config_of(file))["model.layers.0.shared_mlp.input_linear.weight"]
    assert found.coded == (KINDS[Q8_0].coded if type_of_ups == Q8_0 else None)
    np.testing.assert_array_equal(found.read(), np.concatenate(numbers))


@pytest.mark.parametrize(
    ("model", "changed", "left", "said"),
    [
        ("granite", {"ssm.time_step_rank": 5}, "", "5 heads in 2 groups, 64 wide together"),
        ("granite", {"ssm.group_count": 3}, "", "4 heads in 3 groups, 64 wide together"),
        ("granite", {"ssm.inner_size": 48}, "", "a scan 48 wide, of a model 32 wide"),
        ("granite", {"ssm.state_size": None}, "", "ssm.state_size is no count"),
        ("granite", {"attention.head_count_kv": [0, 2]}, "", "head_count_kv is no list of its layers"),
        ("granite", {"rope.dimension_count": 4}, "", "turned in part"),
        ("granite", {}, "ffn_up", "'blk.0.ffn_gate.weight' has no other of its shape for up"),
        ("falcon", {}, "output.weight", "lacks the tensor 'output.weight', and does not say by what logits"),
        ("falcon", {"embedding_scale": 2.0}, "", "falcon-h1.embedding_scale, which is not read"),
        ("nemotron", {"feed_forward_length": [0, 24, 24]}, "", "both heads of keys and an MLP"),
        ("nemotron", {"feed_forward_length": [0, 16, 24]}, "", "feed_forward_length is no count"),
        ("nemotron", {"expert_count": 4}, "", "nemotron_h.expert_count, which is not read"),
    ],
)
def test_what_makes_another_model_is_refused(
    model: str, changed: dict[str, Any], left: str, said: str, tmp_path: Path
) -> None:
    file = as_file(tmp_path / "m.gguf", model, changed, left)
    with pytest.raises(LlmcError, match=said):
        checkpoint_of(file, config_of(file))


def test_a_factor_that_no_field_says_changes_nothing(tmp_path: Path) -> None:
    """And scores are scaled by the size of a head then, as llama.cpp does."""
    named = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    config = config_of(as_file(tmp_path / "m.gguf", "granite", {**dict.fromkeys(named), "logit_scale": 0.0}))
    said = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    assert [config[name] for name in said] == [8**-0.5, 1.0, 1.0, 1.0]


def test_an_epsilon_of_norms_that_is_said_by_itself_is_taken(tmp_path: Path) -> None:
    config = config_of(as_file(tmp_path / "m.gguf", "nemotron", {"attention.layer_norm_rms_epsilon": 1e-4}))
    assert config["layer_norm_epsilon"] == 1e-4

"""Files of models that scan as Mamba 1 does, laid out as llama.cpp's converter does, are read as they were.

Layout: conversion/mamba.py and jamba.py of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmc.compiler.frontend.gguf.file import GgufFile, open_gguf
from llmc.compiler.frontend.gguf.model import architecture_of, checkpoint_of, config_of
from llmc.compiler.frontend.gguf.scan import JAMBA, MAMBA
from llmc.runtime.errors import LlmcError
from tests.compiler.test_gguf import F32, Tensors, write
from tests.compiler.test_gguf_architectures import experts_of
from tests.compiler.test_gguf_mamba import read_of

Array = np.ndarray[Any, Any]
HIDDEN, STATE, RANK = 32, 8, 4
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 4, "pad_token_id": None}
SCAN: dict[str, Any] = {"state_size": STATE, "time_step_rank": RANK, "tie_word_embeddings": False}
ATTENTION: dict[str, Any] = {
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_state": STATE,
    "mamba_dt_rank": RANK,
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": SCAN,
    "falcon_mamba": SCAN,
    "jamba": ATTENTION,
    "jamba of one expert": ATTENTION | {"num_experts": 1, "num_experts_per_tok": 1},
}
WORDS: dict[str, Any] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 2 * HIDDEN,
    "ssm.state_size": STATE,
    "ssm.time_step_rank": RANK,
    "block_count": 4,
    "embedding_length": HIDDEN,
    "context_length": 64,
}


def small(model: str) -> Any:
    """No weight of it is one or zero throughout."""
    config = CONFIG_MAPPING[model.split()[0]](**SIZES | MODELS[model], max_position_embeddings=64)
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for each in found.state_dict().values():
            each.copy_(torch.randn(each.shape) / 4)
    return found


def tensors_of(name: str, values: Array, model: str) -> dict[str, Array]:
    """The file's tensors for one of transformers'."""
    known = JAMBA if model.startswith("jamba") else MAMBA
    stem, _, end = name.rpartition(".")
    if ".layers." not in name:
        return {f"{next(own for own, other in known.outside.items() if other == stem)}.{end}": values}
    _, _, number, place = name.split(".", 3)
    layer, part = f"blk.{number}", place.rpartition(".")[0]
    if "experts." in place:
        return experts_of(layer, place.rpartition(".")[2], values, "rows")
    if place.endswith((".A_log", ".D")):
        return {f"{layer}.ssm_a": -np.exp(values)} if "A_log" in place else {f"{layer}.ssm_d": values}
    values = values[:, 0] if place.endswith("conv1d.weight") else values
    return {f"{layer}.{next(own for own, other in known.layers.items() if other == part)}.{end}": values}


def fields_of(model: str) -> dict[str, Any]:
    if not model.startswith("jamba"):
        own = {"attention.head_count": 0, "feed_forward_length": 0, "ssm.dt_b_c_rms": model == "falcon_mamba"}
        return {**WORDS, **own, "attention.layer_norm_rms_epsilon": 1e-5}
    n_experts = MODELS[model]["num_experts"]
    experts = {"expert_count": n_experts, "expert_used_count": min(n_experts, 2), "feed_forward_length": 24}
    heads = {"attention.head_count": 4, "attention.head_count_kv": [0, 2, 0, 0]}
    return {**WORDS, **experts, **heads, "attention.layer_norm_rms_epsilon": 1e-6}


def as_file(path: Path, model: str, changed: dict[str, Any] | None = None, left: str = "") -> GgufFile:
    """The small model as a file, all of it but the tensors that are `left` out."""
    kind, tensors = "jamba" if model.startswith("jamba") else "mamba", Tensors()
    for name, values in small(model).state_dict().items():
        for own, each in tensors_of(name, values.numpy(), model).items():
            if not left or left not in own:
                tensors[own] = (each.shape, F32, np.ascontiguousarray(each, np.float32).tobytes())
    fields = {f"{kind}.{name}": value for name, value in (fields_of(model) | (changed or {})).items()}
    return open_gguf(write(path, {"general.architecture": kind, **fields}, tensors))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_logits_of_its_model(name: str, tmp_path: Path) -> None:
    model, file = small(name), as_file(tmp_path / "m.gguf", name)
    assert architecture_of(file).model_type == name.split()[0]
    read = read_of(file)
    for own, values in model.state_dict().items():
        np.testing.assert_allclose(read.state_dict()[own], values, rtol=1e-6, atol=2e-7, err_msg=own)
    ids = torch.arange(36).reshape(2, 18)
    with torch.no_grad():
        np.testing.assert_allclose(read(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "changed", "left", "said"),
    [
        ("mamba", {"ssm.inner_size": 48}, "", "a scan 48 wide, of a model 32 wide"),
        ("mamba", {"ssm.time_step_rank": 0}, "", "ssm.time_step_rank is no count"),
        ("mamba", {"expert_count": 2}, "", "mamba.expert_count, which is not read"),
        (
            "jamba",
            {"attention.head_count_kv": [2, 2, 0, 0]},
            "",
            "layers 0, 1 with attention are no even distance apart",
        ),
        ("jamba", {"attention.head_count_kv": [2, 0, 0]}, "", "head_count_kv is no list of its layers"),
        ("jamba", {"attention.head_count": 0}, "", "attention.head_count is no count"),
        ("jamba", {"attention.head_count_kv": [0, 0, 0, 0]}, "", "attention.head_count_kv is no count"),
    ],
)
def test_what_makes_another_model_is_refused(
    model: str, changed: dict[str, Any], left: str, said: str, tmp_path: Path
) -> None:
    file = as_file(tmp_path / "m.gguf", model, changed, left)
    with pytest.raises(LlmcError, match=said):
        checkpoint_of(file, config_of(file))

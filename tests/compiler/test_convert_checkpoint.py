"""Checkpoints with older names or in pieces are read as transformers itself loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PretrainedConfig

from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.convert_checkpoint import changes_of, convert_checkpoint, from_torch, to_torch
from llmc.runtime.errors import LlmcError

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTRAL = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=12, num_experts_per_tok=2)


def save(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A random model in a folder, under the names that checkpoints have; its tensors under the model's own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_lie_apart_are_one_tensor_in_their_order(tmp_path: Path, dtype: torch.dtype) -> None:
    state = save(MIXTRAL, tmp_path, dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert any(".experts.11.w3." in name for name in checkpoint)  # behind experts.2 by number alone
    converted = convert_checkpoint(checkpoint, set(state), changes_of("MixtralForCausalLM", MIXTRAL), MIXTRAL)
    assert set(converted) == set(state)
    for name, tensor in state.items():
        assert converted[name].dims == tuple(tensor.shape)
        assert torch.equal(to_torch(converted[name].read()), tensor), name


def test_a_missing_expert_is_told_before_anything_is_read(tmp_path: Path) -> None:
    state = save(MIXTRAL, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("experts.11.w3.weight"))]
    save_file(tensors, file)
    converted = convert_checkpoint(
        open_checkpoint(tmp_path), set(state), changes_of("MixtralForCausalLM", MIXTRAL), MIXTRAL
    )
    name = next(name for name, tensor in converted.items() if "gate_up_proj" in name and "layers.0" in name)
    with pytest.raises(LlmcError, match=r"do not make 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"):
        _ = converted[name].dims


def test_a_renamed_tensor_is_found(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**SIZES, max_position_embeddings=32)
    state = save(config, tmp_path)
    assert "embed_out.weight" in open_checkpoint(tmp_path)
    source = load_source(str(tmp_path))
    assert np.array_equal(source.weights["lm_head.weight"].numpy(), state["lm_head.weight"].numpy())
    assert source.weights["lm_head.weight"].name == "lm_head.weight"


def test_a_name_that_the_model_knows_is_kept(tmp_path: Path) -> None:
    """A checkpoint of today's names is not renamed by a pattern that happens to fit."""
    save(MIXTRAL, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    some = next(name for name in checkpoint if ".block_sparse_moe.gate." in name)
    assert some in convert_checkpoint(checkpoint, {some}, changes_of("MixtralForCausalLM", MIXTRAL), MIXTRAL)


def test_bfloat16_goes_to_torch_and_back() -> None:
    tensor = torch.randn(3, 5).bfloat16()
    assert torch.equal(to_torch(from_torch(tensor.t())), tensor.t())

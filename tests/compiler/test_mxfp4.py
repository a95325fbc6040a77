"""Checkpoints whose experts are in MXFP4: the numbers that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmc.compiler.driver import finish_graph
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.mxfp4 import join_blocks, unpack
from llmc.compiler.quantize import Scheme, quantize
from llmc.runtime.errors import LlmcError

EXPERTS = "model.layers.0.mlp.experts."


def blocks_and_scales(n_experts: int, rows: int, groups: int, first: int, last: int) -> tuple[torch.Tensor, ...]:
    """Any bytes, and scales from `first` to `last`."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (n_experts, rows, groups, 16), np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(random.integers(first, last + 1, blocks.shape[:3], np.uint8))


def test_numbers_are_those_of_transformers_bit_for_bit() -> None:
    blocks, scales = blocks_and_scales(3, 16, 90, 0, 254)
    scales[0, :3, :85] = torch.arange(255).reshape(3, 85)
    wanted = convert_moe_packed_tensors(blocks, scales).view(torch.uint16).numpy()
    found = unpack(blocks.numpy(), scales.numpy()).transpose(0, 2, 1)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), wanted)


def test_they_keep_their_values_as_codes() -> None:
    """Whatever the largest of a block is: scales are found again, or others that are as good."""
    blocks, scales = (part.numpy() for part in blocks_and_scales(3, 16, 3, 2, 250))
    blocks[0, :, 0] &= 0x11  # blocks of small numbers, and of one
    blocks[1, :, 1] = 0
    blocks[1, :, 1, 5] = np.arange(16)
    values = unpack(blocks, scales).astype(np.float32).reshape(48, 96)
    scheme = Scheme.parse("mxfp4")
    assert scheme is not None
    found = quantize(values[:, :80], scheme)
    np.testing.assert_array_equal(found.values(), values[:, :80])
    assert set(np.unique(np.abs(found.codes))) <= {0, 1, 2, 3, 4, 6, 8, 12}
    np.testing.assert_array_equal(found.scales.astype(ml_dtypes.bfloat16), found.scales)


def test_other_weights_are_rounded_to_the_nearest() -> None:
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    found = quantize(values, Scheme(4, 32, number="mx"))
    numbers = np.array([0, 1, 2, 3, 4, 6, 8, 12])
    units = np.repeat(found.scales, 32, axis=1)
    nearest = np.abs(np.abs(values)[..., None] / units[..., None] - numbers).min(-1)
    np.testing.assert_allclose(np.abs(found.values() - values) / units, nearest, atol=1e-5)
    assert np.square(found.values() - values).sum() < 0.02 * np.square(values).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss as it is published: experts in blocks and scales, all else in bfloat16."""
    path = tmp_path_factory.mktemp("mxfp4")
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        n_experts, k, rows = tensors.pop(f"{EXPERTS}{name}").shape
        blocks, scales = blocks_and_scales(n_experts, rows, k // 32, 118, 122)
        tensors |= {f"{EXPERTS}{name}_blocks": blocks, f"{EXPERTS}{name}_scales": scales}
    save_file(tensors, path / "model.safetensors")
    fields: dict[str, Any] = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_a_checkpoint_is_read_as_bfloat16(folder: Path) -> None:
    source = load_source(str(folder))
    assert source.dtype == "bf16"
    assert source.is_packed
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        parts = (tensors[f"{EXPERTS}{name}_{part}"] for part in ("blocks", "scales"))
        wanted = convert_moe_packed_tensors(*parts).float().numpy()
        np.testing.assert_array_equal(source.weights[EXPERTS + name].numpy(), wanted)


def test_gpus_are_refused_by_name(folder: Path) -> None:
    scheme = Scheme.parse("mxfp4")
    with pytest.raises(LlmcError, match="experts in mxfp4 have no kernels for GPUs"):
        finish_graph(load_source(str(folder)).graph, scheme, "cuda", lambda *_: None)


def test_blocks_without_scales_and_other_shapes_are_named(folder: Path) -> None:
    blocks, scales = (
        {name: tensor for name, tensor in open_checkpoint(folder).items() if name.endswith(end)}
        for end in ("_blocks", "_scales")
    )
    with pytest.raises(LlmcError, match=r"lacks the tensor 'model.layers.0.mlp.experts.[a-z_]*_scales'"):
        join_blocks(blocks)
    checkpoint = blocks | dict(zip(reversed(scales), scales.values(), strict=True))
    with pytest.raises(LlmcError, match=r"is no blocks and scales in MXFP4: U8 \[3, 64, ., 16\] and U8"):
        join_blocks(checkpoint)

"""Checkpoints whose weights are in float8 with a scale for each block: the numbers that transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.packed.float8 import join_blocks
from llmc.runtime.errors import LlmcError

NAME = "model.layers.0.mlp.up_proj.weight"


def saved(folder: Path, rows: int, columns: int, scales: tuple[int, int]) -> dict[str, torch.Tensor]:
    codes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {NAME: codes, f"{NAME}_scale_inv": torch.rand(scales, generator=torch.Generator().manual_seed(1))}
    tensors["norm.weight"] = torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (130, 200)])
def test_numbers_are_those_of_transformers(tmp_path: Path, rows: int, columns: int) -> None:
    tensors = saved(tmp_path, rows, columns, (-(-rows // 128), -(-columns // 128)))
    joined = join_blocks(open_checkpoint(tmp_path), (128, 128))
    assert sorted(joined) == [NAME, "norm.weight"]
    exact = _dequantize_fp8_weight(tensors[NAME], tensors[f"{NAME}_scale_inv"], [128, 128], torch.float32)
    wanted = exact.bfloat16()
    assert joined[NAME].stored_dtype == "bf16"
    np.testing.assert_array_equal(joined[NAME].read().view(np.uint16), wanted.view(torch.uint16).numpy())


def test_scales_of_other_blocks_and_without_codes_are_named(tmp_path: Path) -> None:
    saved(tmp_path, 128, 256, (1, 1))
    with pytest.raises(LlmcError, match="is no float8 with scales for blocks of 128 by 128"):
        join_blocks(open_checkpoint(tmp_path), (128, 128))
    alone = {name: tensor for name, tensor in open_checkpoint(tmp_path).items() if name != NAME}
    with pytest.raises(LlmcError, match=f"the checkpoint lacks the tensor '{NAME}'"):
        join_blocks(alone, (128, 128))

"""Checkpoints whose experts are in MXFP4: the numbers that transformers makes of them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.packed.mxfp4 import join_blocks, unpack
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.runtime.errors import LlmcError


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


def stored(name: str, *dims: int, dtype: str = "U8") -> StoredTensor:
    return StoredTensor(name, Path("model.safetensors"), dtype, dims, 0, int(np.prod(dims)))


def test_blocks_and_scales_are_one_tensor() -> None:
    parts = [stored("up_blocks", 3, 64, 2, 16), stored("up_scales", 3, 64, 2), stored("norm", 64, dtype="BF16")]
    joined = join_blocks({part.name: part for part in parts})
    assert list(joined) == ["norm", "up"]
    assert joined["up"].dims == (3, 64, 64)
    assert joined["up"].stored_dtype == "bf16"
    assert joined["up"].parts == tuple(parts[:2])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([stored("up_blocks", 3, 64, 2, 16)], "lacks the tensor 'up_scales'"),
        ([stored("up_blocks", 3, 64, 2, 16), stored("up_scales", 3, 64, 1)], "'up' is no blocks and scales in MXFP4"),
        ([stored("up_blocks", 3, 64, 32), stored("up_scales", 3, 64)], "'up' is no blocks and scales in MXFP4"),
        ([stored("up_blocks", 3, 4, 2, 16, dtype="I8"), stored("up_scales", 3, 4, 2)], "MXFP4: I8 "),
    ],
)
def test_blocks_without_scales_and_other_shapes_are_named(parts: list[StoredTensor], said: str) -> None:
    with pytest.raises(LlmcError, match=said):
        join_blocks({part.name: part for part in parts})

"""Weights that a checkpoint keeps in float8 with a scale for each block: read as bfloat16.

A tensor NAME.weight [N, K] in e4m3fn has beside it NAME.weight_scale_inv, float32 [ceil(N/R), ceil(K/C)]: what each
block of R rows and C columns is multiplied by; config.json says R and C.  DeepSeek-AI 2024, arXiv:2412.19437.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import ml_dtypes
import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.weights import Array, StoredDType
from llmc.runtime.errors import LlmcError

METHOD, DTYPE = "fp8", "F8_E4M3"
SCALES = "_scale_inv"


@dataclass(frozen=True)
class Fp8Tensor(StoredTensor):
    """The tensor that codes and scales stand for; block: rows and columns that share a scale."""

    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.codes, self.scales

    @property
    def stored_dtype(self) -> StoredDType:
        return "bf16"

    def read(self) -> Array:
        """The values, bfloat16 [N, K].  A strip of rows that share scales at a time: no more than they in float32."""
        codes = self.codes.read_bytes().view(ml_dtypes.float8_e4m3fn)
        scales = self.scales.read().astype(np.float32, copy=False)
        rows, columns = self.block
        values = np.empty(self.dims, ml_dtypes.bfloat16)
        for strip, of_strip in enumerate(scales):
            at = slice(strip * rows, (strip + 1) * rows)
            each = np.repeat(of_strip, columns)[: self.dims[1]]
            values[at] = codes[at].astype(np.float32) * each
        return values


def fp8_block(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if config.json says that weights are kept so."""
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        return None
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return block[0], block[1]
    return None


def join_scales(checkpoint: Mapping[str, StoredTensor], block: tuple[int, int]) -> dict[str, StoredTensor]:
    """The checkpoint with one tensor in place of each pair of codes and scales.  Reads no tensor."""
    tensors = dict(checkpoint)
    for name in [name for name in checkpoint if name.endswith(SCALES)]:
        whole = name.removesuffix(SCALES)
        codes = tensors.get(whole)
        if codes is None:
            raise LlmcError(f"the checkpoint lacks the tensor {whole!r}", place=str(checkpoint[name].file))
        tensors[whole] = joined(codes, tensors.pop(name), block)
    return tensors


def joined(codes: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> Fp8Tensor:
    dims = codes.dims
    is_matrix = codes.dtype == DTYPE and len(dims) == 2 and codes.n_bytes == prod(dims)
    expected = tuple(ceil(size / each) for size, each in zip(dims, block, strict=False))
    if not is_matrix or scales.dims != expected or scales.dtype not in ("F32", "BF16"):
        shapes = f"{codes.dtype} {list(dims)} and {scales.dtype} {list(scales.dims)}"
        fact = f"tensor {codes.name!r} is no float8 with scales for blocks of {block[0]} by {block[1]}: {shapes}"
        raise LlmcError(fact, place=str(codes.file), hint="download the model again")
    return Fp8Tensor(codes.name, codes.file, METHOD, dims, codes.offset, codes.n_bytes, codes, scales, block)

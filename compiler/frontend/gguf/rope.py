"""How a GGUF file says that positions turn queries and keys."""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

from llmc.compiler.frontend.checkpoint import DTYPES, StoredTensor
from llmc.compiler.frontend.gguf.fields import count, number
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.runtime.errors import LlmcError, shortened

FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3 stretches its positions by, but for the factor."""


def rope_of(file: GgufFile, turned: int) -> dict[str, Any]:
    """How positions turn so many elements of a head."""
    theta = number(file, "rope.freq_base", 10000.0)
    kind = file.fields.get(f"{file.architecture}.rope.scaling.type", "none")
    frequencies = file.tensors.get(FREQUENCIES)
    if frequencies is not None:
        return _llama3(file, frequencies, theta, turned)
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": number(file, "rope.scaling.factor", 1.0)}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn(file)}
    if kind != "none":
        raise LlmcError(f"positions scaled by {shortened(kind)!r} are not read from GGUF", place=str(file.path))
    return {"rope_type": "default", "rope_theta": theta}


def _yarn(file: GgufFile) -> dict[str, Any]:
    found: dict[str, Any] = {
        "factor": number(file, "rope.scaling.factor", 1.0),
        "original_max_position_embeddings": count(file, "rope.scaling.original_context_length"),
        "beta_fast": number(file, "rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": number(file, "rope.scaling.yarn_beta_slow", 1.0),
    }
    if file.architecture == "gpt-oss":
        found["truncate"] = False
    if file.architecture == "mistral3":
        found["mscale"] = found["mscale_all_dim"] = number(file, "rope.scaling.yarn_log_multiplier", 1.0)
        found["llama_4_scaling_beta"] = number(file, "attention.temperature_scale", 0.1)
    multiplier = "rope.scaling.yarn_log_multiplier"
    if file.architecture == "deepseek2" and f"deepseek2.{multiplier}" in file.fields:
        # files have a tenth of it, and of the two one: scores are scaled by it, turned parts by their quotient
        found["mscale"] = found["mscale_all_dim"] = round(10 * number(file, multiplier, 0.0, least=0.0), 6)
    return found


def _llama3(file: GgufFile, frequencies: StoredTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's way, if it is what these divisors of each frequency come from."""
    if frequencies.dims != (head_dim // 2,) or frequencies.dtype not in DTYPES:
        raise LlmcError(f"tensor {FREQUENCIES!r} has the shape {list(frequencies.dims)}", place=str(file.path))
    divisors = frequencies.read().astype(np.float64)
    factor = float(divisors.max())
    waves = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    before = LLAMA3["original_max_position_embeddings"]
    if file.architecture == "llama4":  # whose step between the two is one
        wanted = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": before}
        if np.array_equal(divisors, np.where(waves > before, factor, 1)):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), **wanted}
    smooth = np.clip((before / waves - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise LlmcError(f"tensor {FREQUENCIES!r} scales positions otherwise than Llama 3 does", place=str(file.path))
    return {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), **LLAMA3}

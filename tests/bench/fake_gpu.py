"""A kit on a machine whose driver stands in for a GPU's: what breaks there is physics, no typo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.gpu.journal import Journal
from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.schedules import cache
from tests.runtime.toy_cuda import FAKE_DRIVER

TARGET = Target("cuda", "sm_90a")
TINY: dict[str, Any] = {
    "micro_times": 1,
    "copy_bytes": 1 << 16,
    "launches": 2,
    "products": [[64, 64, 64]],
    "sustained_s": 0.0,
    "l2_bytes": 1 << 12,
    "shortest_ms": 0.0,
    "replays": 2,
    "in_place": [[1, 40]],
    "short": [[1, 40]],
    "decode": [[1, 40]],
    "timeline": [[1, 40]],
    "traced_prompts": [40],
    "quantised": [],
    "compiled": [],
    "flash": [],
    "decode_large": [],
    "prefill": [40],
    "switched_prompts": [100],
    "pairs": 2,
    "read": 64,
    "first": 1,
    "steps": 3,
    "prompts": 2,
}
CUBIN = b"\x7fELF, as the fake driver sees it"


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 192,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
    "vocab_size": 160,
    "max_position_embeddings": 192,
    "dtype": "bfloat16",
}
TUNED = ("RMSNormLinear bf16 [128, 64] M=1", "RotaryPagedAttention bf16 [64, 32] M=1", "Linear bf16 [64, 96] M=64")
"""Calls that are tuned here: a GEMV, attention, a flat GEMM."""


class Made:
    """Kernels for a GPU that were compiled, without a compiler."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: dict[str, Kernel] = {}
        self._for_a_cpu = cache.compile_kernels
        patch.setattr(cache, "compile_kernels", self.compile)

    def compile(self, kernels: Sequence[Kernel], target: Target, progress: object = None) -> list[bytes]:
        if target.kind == "cpu":
            return self._for_a_cpu(kernels, target)
        self.kernels |= {kernel.name: kernel for kernel in kernels}
        return [CUBIN for _ in kernels]


def run(kit: Path, out: Path, *options: str, **environment: str) -> Journal:
    """run.py of the kit, alone: it sees nothing of this checkout."""
    started(kit, out, *options, **environment).check_returncode()
    return Journal(out / "results.jsonl")


def started(kit: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(kit / "kit" / "run.py"), "-o", str(out), *options]
    env = {**environment_of(kit, out), **environment}
    return subprocess.run(command, env=env, check=False, cwd=out.parent, stderr=subprocess.PIPE, text=True)


def environment_of(kit: Path, out: Path) -> dict[str, str]:
    """Of a program that sees the kit, and the driver that stands in for a GPU's."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LLMC_CUDA_DRIVER": str(kit / FAKE_DRIVER),
        "LLMC_FAKE_CUDA_KERNELS": str(kit / "kernels.so"),
        "LLMC_FAKE_CUDA_LOG": str(out.parent / "fake.log"),
    }


def outcomes(journal: Journal, stage: str) -> dict[str, str]:
    return {item: entry["event"] for item, entry in journal.latest(stage).items()}


def misuse(log: Path) -> list[str]:
    """What the fake driver blames, but for facts of devices that it does not know."""
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("error", "leak")) and not line.startswith("error: attribute")]

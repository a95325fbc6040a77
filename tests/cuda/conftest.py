"""Whole models for a GPU, run without one: emulated kernels behind a driver that is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig, OPTConfig

import llmc
from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.schedules import cache
from tests.emulator.build import build_library
from tests.runtime.toy_cuda import CUBIN, build_driver

HOPPER = Target("cuda", "sm_90a")

LLAMA = LlamaConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=192,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
OPT = OPTConfig(
    hidden_size=128,
    ffn_dim=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=128,
    vocab_size=160,
    max_position_embeddings=192,
    init_std=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA4 = Gemma4TextConfig(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    sliding_window=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    head_dim=32,
    global_head_dim=64,
    hidden_size_per_layer_input=32,
    vocab_size=160,
    vocab_size_per_layer_input=160,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=64,
    max_position_embeddings=192,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
"""Layers with caches of two sizes, which the last two share, inputs and experts of their own."""
CONFIGS: dict[str, Any] = {"llama": LLAMA, "opt": OPT, "gemma4": GEMMA4}
BATCH = (1, 3, 8, 12)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family."""
    made: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in made:
            torch.manual_seed(1)
            made[family] = tmp_path_factory.mktemp(family)
            AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(made[family])
        return made[family]

    return save


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch, fake_driver: Path, tmp_path: Path) -> EmulatedGpu:
    return EmulatedGpu(monkeypatch, fake_driver, tmp_path / "driver.log")


class EmulatedGpu:
    """Compiles models for a GPU and opens them: the driver is fake, the kernels run on the emulator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: Path, log: Path) -> None:
        self.monkeypatch, self.driver, self.log = monkeypatch, driver, log
        self.libraries: dict[Target, Path] = {}

    def compile(self, folder: Path, out: Path, target: str = str(HOPPER), **options: Any) -> dict[str, Any]:
        """Compile without a CUDA compiler: images are names, under which the driver finds emulated kernels.

        The GPU is then one of the first target for one.
        """
        compiled: dict[Target, Sequence[Kernel]] = {}
        for_a_cpu = cache.compile_kernels

        def images(kernels: Sequence[Kernel], target: Target, progress: Any = None) -> list[bytes]:
            if target.kind == "cpu":
                return for_a_cpu(kernels, target, progress)
            compiled[target] = kernels
            return [CUBIN for _ in kernels]

        with self.monkeypatch.context() as patch:
            patch.setattr(cache, "compile_kernels", images)
            report = llmc.compile(folder, out=out, target=target, **{"verify": False, **options})
        self.libraries |= {target: build_library(kernels, target) for target, kernels in compiled.items()}
        self.monkeypatch.setenv("LLMC_CUDA_DRIVER", str(self.driver))
        self.monkeypatch.setenv("LLMC_FAKE_CUDA_LOG", str(self.log))
        self.become(next(iter(compiled)))
        return report

    def become(self, target: Target) -> None:
        """Another GPU, of an architecture that was compiled for."""
        self.monkeypatch.setenv("LLMC_FAKE_CUDA_KERNELS", str(self.libraries[target]))
        self.monkeypatch.setenv("LLMC_FAKE_CUDA", f"capability={target.arch}")

    def complaints(self) -> list[str]:
        """What the driver found wrong with how it was used."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(("error", "leak"))]

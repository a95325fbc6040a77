"""Artifacts for ARM: they say, bit for bit, what those for AVX2 say, whose kernels they share.

They run under qemu (Debian: apt-get install qemu-user-static libc6-arm64-cross); where there is none they are compiled.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.artifact import ArtifactFile
from tests.families import ENCODERS, FAMILIES, SIZES, save
from tests.runtime import toy_artifact as toy
from tests.test_adapters import Made
from tests.test_encoders import few_bodies

MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=192,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        hidden_size=96,
        ffn_dim=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        vocab_size=130,
        max_position_embeddings=192,
        word_embed_proj_dim=96,
    ),
}
MODELS |= {name: CONFIG_MAPPING[name](**{**SIZES, **FAMILIES[name]}) for name in ("gpt_oss", "deepseek_v3")}
PROMPT = [3 + 7 * i % 125 for i in range(70)]
N_TOKENS = 5
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
LIBRARIES = Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))
CAN_RUN = QEMU is not None and (LIBRARIES / "lib/ld-linux-aarch64.so.1").exists()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, config in MODELS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """logits.c for ARM."""
    path = tmp_path_factory.mktemp("program") / "logits"
    flags = "-Wall", "-Wextra", "-Werror", f"-I{toy.RUNTIME}/include", "-ldl", "-o", path
    compiler = sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28"
    subprocess.run([*compiler, Path(__file__).with_name("logits.c"), *flags], check=True)
    return path


def compiled(source: Path, path: Path, target: str, options: dict[str, Any]) -> Path:
    llmc.compile(source, out=path, target=target, batch=(1,), verify=False, **options)
    return path


def test_an_artifact_for_arm_is_compiled_anywhere_and_runs_nowhere_else(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = compiled(models["llama"], tmp_path / "a.so", "cpu:aarch64+i8mm", {"quant": "int4", "kv_dtype": "int8"})
    with ArtifactFile.open(path) as file:
        assert file.targets == ["cpu:aarch64+i8mm"]
    if platform.machine() == "x86_64":
        with pytest.raises(LlmcError, match="code is for aarch64, and this machine is one of x86_64"):
            llmc.load(path)


@pytest.mark.skipif(not CAN_RUN, reason="no qemu-aarch64, or no libc of ARM")
@pytest.mark.parametrize(
    ("model", "level", "options"),
    [
        ("opt", "aarch64", {"dtype": "f32"}),
        ("llama", "aarch64", {"dtype": "bf16", "kv_dtype": "int8"}),
        ("llama", "aarch64", {"dtype": "bf16", "quant": "int8"}),
        ("llama", "aarch64+i8mm", {"dtype": "f32", "quant": "int4"}),
        ("llama", "aarch64", {"dtype": "bf16", "quant": "fp8"}),
        ("gpt_oss", "aarch64+i8mm", {"dtype": "bf16", "quant": "mxfp4"}),
        ("deepseek_v3", "aarch64", {"dtype": "bf16"}),
    ],
)
def test_it_says_what_that_for_avx2_says(
    models: dict[str, Path], program: Path, tmp_path: Path, model: str, level: str, options: dict[str, Any]
) -> None:
    source, n_vocab = models[model], MODELS[model].vocab_size
    here = compiled(source, tmp_path / "here.so", "cpu:x86-64-v3", options)
    there = compiled(source, tmp_path / "there.so", f"cpu:{level}", options)
    with llmc.load(here) as loaded, loaded.sequence() as sequence:
        prompt = PROMPT[: loaded.info.n_context - N_TOKENS]
        sequence.feed(prompt)
        wanted = [sequence.logits()]
        for _ in range(N_TOKENS):
            sequence.feed([int(np.argmax(wanted[-1]))])
            wanted.append(sequence.logits())
    said = said_there(program, there, prompt, N_TOKENS).reshape(-1, n_vocab)
    np.testing.assert_array_equal(said, np.stack(wanted))


@pytest.mark.skipif(not CAN_RUN, reason="no qemu-aarch64, or no libc of ARM")
def test_a_text_is_made_into_what_that_for_avx2_makes(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an encoder, over all of it."""
    few_bodies(monkeypatch)
    family, sizes = ENCODERS["modernbert"]
    source = save(family, tmp_path / "m", torch.float32, AutoModel, **sizes, max_position_embeddings=128)
    options = {"dtype": "bf16", "quant": "int8"}
    here = compiled(source, tmp_path / "here.so", "cpu:x86-64-v3", options)
    there = compiled(source, tmp_path / "there.so", "cpu:aarch64+i8mm", options)
    with llmc.load(here) as loaded, loaded.sequence() as sequence:
        sequence.feed(PROMPT)
        np.testing.assert_array_equal(said_there(program, there, PROMPT, 0), sequence.logits())


@pytest.mark.skipif(not CAN_RUN, reason="no qemu-aarch64, or no libc of ARM")
def test_an_adapter_makes_what_it_makes_on_avx2(program: Path, tmp_path: Path) -> None:
    made = Made(tmp_path)
    options = {"dtype": "bf16", "adapters": made.named, "max_sequence": 96}
    here = compiled(made.folder, tmp_path / "here.so", "cpu:x86-64-v3", options)
    there = compiled(made.folder, tmp_path / "there.so", "cpu:aarch64", options)
    with llmc.load(here, kv_tokens=256) as loaded, loaded.sequence("sql") as sequence:
        sequence.feed(PROMPT)
        np.testing.assert_array_equal(said_there(program, there, PROMPT, 0), sequence.logits())
        assert not np.array_equal(sequence.logits(), loaded.logits(PROMPT)[-1])


def said_there(program: Path, artifact: Path, prompt: list[int], n_tokens: int) -> np.ndarray[Any, Any]:
    """Logits behind a prompt, and behind each of so many tokens that the artifact chooses, all in a row."""
    command = [str(QEMU), "-L", str(LIBRARIES), str(program), str(artifact), str(n_tokens), ",".join(map(str, prompt))]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32)

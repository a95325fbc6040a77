"""A model with states from its checkpoint to tokens: those of Hugging Face, the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig, Qwen3NextConfig

import llmc
from llmc.cli.main import main
from llmc.cli.output import in_bytes
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError

CONFIG: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "max_position_embeddings": 96,
}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(3, 160, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as they are published: in bf16, with the layers that guess several tokens, which are left aside."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    path = tmp_path_factory.mktemp("qwen3_next")
    model.to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors") | {"mtp.fc.weight": torch.ones(64, 128, dtype=torch.bfloat16)}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    report = llmc.compile(folder, out=folder.parent / "states.so", batch=(1, 2))
    assert report["certificate"]["status"] == "passed"
    with llmc.load(folder.parent / "states.so", threads=2, kv_tokens=512) as model:
        yield model


def test_the_artifact_says_what_a_sequence_takes(model: Model) -> None:
    rule, conv = 4 * 4 * 16 * 24, 4 * 3 * (2 * 2 * 16 + 4 * 24)
    assert model.info.slot_bytes == model.manifest["memory"]["slot_bytes"] == rule + conv
    assert model.info.n_slots == 2 * 2
    assert model.manifest["format_version"] == 4


def test_inspect_says_it_too(model: Model) -> None:
    said = CliRunner().invoke(main, ["inspect", str(model.path)])
    assert f", states {in_bytes(model.info.slot_bytes)} a sequence" in said.output


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """One without attention: nothing of it grows with a text."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 160, "hidden_size": 64, "state_size": 8, "max_position_embeddings": 96}
    network = AutoModelForCausalLM.from_config(MambaConfig(num_hidden_layers=1, **sizes))
    path = tmp_path_factory.mktemp("mamba")
    network.to(torch.bfloat16).save_pretrained(path)
    assert llmc.compile(path, out=path / "mamba.so", batch=(1, 2))["certificate"]["status"] == "passed"
    with llmc.load(path / "mamba.so", threads=2, kv_tokens=512) as model:
        yield model


def test_a_scan_goes_forwards_alone(mamba: Model) -> None:
    assert mamba.info.slot_bytes == 4 * 128 * (8 + 3)
    with mamba.sequence() as sequence:
        sequence.feed(TOKENS[:9])
        with pytest.raises(LlmcError, match="state"):
            sequence.truncate(5)


@pytest.mark.parametrize("which", ["model", "mamba"])
def test_bits_are_the_same_in_any_chunks_and_company(which: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(which)
    whole = model.logits(TOKENS)
    with model.sequence() as sequence, model.sequence() as other:
        parts = [sequence.feed_for_logits(part) for part in (TOKENS[:33], TOKENS[33:34], TOKENS[34:36])]
        other.feed(TOKENS[7:20])
        for token in TOKENS[36:40]:
            model.step([(other, [5]), (sequence, [token])])
        with sequence.fork() as twin:
            twin.feed(TOKENS[:3])
            parts += [sequence.logits()[None], sequence.feed_for_logits(TOKENS[40:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole[[*range(36), *range(39, len(TOKENS))]])


@pytest.mark.parametrize("which", ["model", "mamba"])
def test_a_saved_sequence_goes_on_to_the_last_bit(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Model = request.getfixturevalue(which)
    with model.sequence() as sequence:
        sequence.feed(TOKENS[:33])
        sequence.save(tmp_path / "text.seq")
    with llmc.load(model.path, threads=1) as other, other.restore(tmp_path / "text.seq") as back:
        parts = [back.logits()[None], back.feed_for_logits(TOKENS[33:])]
    np.testing.assert_array_equal(np.concatenate(parts), model.logits(TOKENS)[32:])


@pytest.mark.parametrize("which", ["model", "mamba"])
def test_guesses_change_no_token(which: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(which)
    prompt = TOKENS[:6] * 3
    said = model.tokens(prompt, max_tokens=24, ignore_eos=True)
    assert model.tokens(prompt, max_tokens=24, ignore_eos=True, speculate=5) == said

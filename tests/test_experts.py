"""A mixture of experts from its checkpoint to tokens: those of Hugging Face, the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import llmc
from llmc.bench.chart import memory
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from tests.compiler.test_packed import in_gptq

CONFIG = MixtralConfig(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=160,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as they are published, with a tensor for each expert."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compiled(folder: Path) -> Iterator[tuple[Model, dict[str, Any]]]:
    report = llmc.compile(folder, out=folder.parent / "mixtral.so", dtype="f32", batch=(1, 2))
    with llmc.load(folder.parent / "mixtral.so") as model:
        yield model, report


def test_tokens_and_logits_are_those_of_hugging_face(folder: Path, compiled: tuple[Model, dict[str, Any]]) -> None:
    model, report = compiled
    assert report["certificate"]["status"] == "passed"
    prompt = [5, 17, 3, 99, 42]
    made = model.tokens(prompt, max_tokens=20, ignore_eos=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        exact = reference(torch.tensor([prompt + made])).logits[0].numpy()
    assert made == exact[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert np.abs(model.logits(prompt + made) - exact).max() <= 2e-4 * np.ptp(exact)


def test_chunks_of_a_prompt_change_no_bit(compiled: tuple[Model, dict[str, Any]]) -> None:
    model, _ = compiled
    ids = [int(token) for token in np.random.default_rng(1).integers(3, 160, 50)]
    whole = model.logits(ids)
    with model.sequence() as sequence:
        parts = [sequence.feed_for_logits(part) for part in (ids[:33], ids[33:34], ids[34:36], ids[36:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_experts_whose_codes_have_zeros_keep_them(folder: Path, tmp_path: Path) -> None:
    """Gates and ups; rows of downs are no whole groups, and were left as floats."""
    path = in_gptq(folder, tmp_path / "gptq", zeros=True)
    report = llmc.compile(path, out=tmp_path / "m.so", dtype="f32", quant="int4", batch=(1,), max_sequence=31)
    assert report["certificate"]["kl_mean"] < 0.01
    with llmc.load(tmp_path / "m.so") as model:
        layouts = {weight["name"]: weight["layout"] for weight in model.manifest["weights"]}
    kinds = {layout.split()[2] for name, layout in layouts.items() if "experts" in name}
    assert kinds == {"z4", "i4"}


def test_a_step_is_set_against_the_experts_that_it_reads(compiled: tuple[Model, dict[str, Any]]) -> None:
    """Two of four, for each of two layers; at two tokens three of four, if they choose by chance.  (48 rows of a gate
    lie in panels for 64.)"""
    manifest = compiled[0].manifest
    experts = memory.experts(manifest)
    assert experts == {"expert_bytes": 4 * 2 * 4 * (2 * 64 * 64 + 64 * 48), "expert_share": 0.5}
    sizes = memory.weight_sizes(manifest)
    unread = [sizes["step_bytes"] - memory.read_bytes(sizes, n_tokens) for n_tokens in (1, 2)]
    assert unread == [experts["expert_bytes"] / 2, experts["expert_bytes"] / 4]


def test_float32_is_refused_for_gpus_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.schedules.cuda.compile.compiler", lambda: None)
    with pytest.raises(LlmcError, match="mixtures of experts in float32 have no kernels for GPUs") as error:
        llmc.compile(folder, out=tmp_path / "m.so", target="cuda:sm_90a,cpu", dtype="f32", verify=False)
    assert error.value.place == "--target cuda"

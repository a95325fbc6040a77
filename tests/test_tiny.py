"""The product in seconds: a two-layer Llama, compiled and run, gives the tokens Hugging Face gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=192,
    bos_token_id=1,
    eos_token_id=2,
)
PROMPT = [5, 17, 3, 99, 42]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(TINY).save_pretrained(path)
    return path


def test_compiled_model_gives_the_same_tokens_and_logits(folder: Path, tmp_path: Path) -> None:
    report = llmc.compile(folder, out=tmp_path / "tiny.so", dtype="f32", batch=(1, 2))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = reference.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        logits = reference(wanted).logits[0].numpy()

    with llmc.load(tmp_path / "tiny.so") as model:
        tokens = model.tokens(PROMPT, max_tokens=24, ignore_eos=True)
        assert tokens == wanted[0, len(PROMPT) :].tolist()
        error = np.abs(model.logits(PROMPT + tokens) - logits).max()

    assert error <= 2e-4 * np.ptp(logits)
    assert report["certificate"]["status"] == "passed"
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.so"]


@pytest.mark.parametrize("limit", [1, 10])
def test_a_context_of_a_few_tokens_is_certified_too(folder: Path, tmp_path: Path, limit: int) -> None:
    report = llmc.compile(folder, out=tmp_path / "short.so", dtype="f32", batch=(1,), max_sequence=limit)
    assert report["certificate"]["status"] == "passed"
    with llmc.load(tmp_path / "short.so") as model:
        assert model.logits([5] * limit).shape == (limit, TINY.vocab_size)

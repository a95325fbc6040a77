"""`--kv-dtype`: how keys and values are kept, what that takes, and what it costs in quality."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.compiler.certificate.certify import kl, log_softmax
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.runtime.test_saved_damage import hashed

STORIES = Path(__file__).parents[1] / "examples" / "stories"
sys.path.insert(0, str(STORIES))

from grammar import stories as tell_stories  # noqa: E402


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demonstration model in bf16, its cache in bf16 and in int8."""
    folder = tmp_path_factory.mktemp("stories")
    paths = {kv_dtype: folder / f"{kv_dtype}.so" for kv_dtype in ("bf16", "int8")}
    for kv_dtype, path in paths.items():
        report = llmc.compile(
            STORIES / "model", out=path, dtype="bf16", kv_dtype=kv_dtype, batch=(1, 2), verify=kv_dtype == "int8"
        )
        assert report["certificate"]["status"] == ("passed" if kv_dtype == "int8" else "skipped")
    return paths


def read(path: Path, n: int) -> list[tuple[list[int], NDArray[np.float32]]]:
    """Tokens and logits of the first stories that the model was not trained on."""
    with llmc.load(path) as model:
        texts = [model.encode(story.text) for story in islice(tell_stories(held_out=True), n)]
        return [(tokens, model.logits(tokens)) for tokens in texts]


def nats_per_token(said: list[tuple[list[int], NDArray[np.float32]]]) -> float:
    """The mean of -log p(next token): the logarithm of perplexity."""
    losses = [-log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]] for tokens, logits in said]
    return float(np.concatenate(losses).mean())


def test_an_int8_cache_hardly_changes_what_the_model_says(stories: dict[str, Path]) -> None:
    exact, rounded = (read(stories[kv_dtype], n=24) for kv_dtype in ("bf16", "int8"))
    divergence = np.concatenate([kl(e, r) for (_, e), (_, r) in zip(exact, rounded, strict=True)])
    error = max(float(np.abs(e - r).max()) for (_, e), (_, r) in zip(exact, rounded, strict=True))
    assert divergence.mean() < 2e-4
    assert error < 0.02 * max(float(np.ptp(e)) for _, e in exact)
    assert abs(nats_per_token(rounded) - nats_per_token(exact)) < 1e-3  # perplexity within a thousandth


def test_an_int8_cache_takes_about_half_the_memory(stories: dict[str, Path]) -> None:
    said: dict[str, Any] = {}
    for kv_dtype, path in stories.items():
        with ArtifactFile.open(path) as file:
            said[kv_dtype] = file.manifest()
    config, cache = said["int8"]["model"]["config"], {name: m["kv_cache"] for name, m in said.items()}
    heads = config.get("num_key_value_heads", config["num_attention_heads"]) * said["int8"]["model"]["n_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    assert {name: c["dtype"] for name, c in cache.items()} == {"bf16": "bf16", "int8": "int8"}
    assert cache["bf16"]["bytes_per_token"] == heads * 2 * head_dim * 2
    assert cache["int8"]["bytes_per_token"] == heads * 2 * (head_dim + 4)
    assert said["int8"]["certificate"]["bar"] == {"kl_mean": 0.01}


def test_an_int8_cache_gives_the_same_bits_alone_in_a_batch_and_on_any_threads(stories: dict[str, Path]) -> None:
    with llmc.load(stories["int8"], threads=1) as model:
        tokens = model.encode("Once upon a time, there was an old man who lived by the sea with his dog. One day,")
        whole = model.logits(tokens)
    with llmc.load(stories["int8"], threads=2) as model, model.sequence() as one, model.sequence() as other:
        for start in range(0, len(tokens), 5):
            model.step([(one, tokens[start : start + 5]), (other, tokens[start : start + 3])])
            last = min(start + 5, len(tokens)) - 1
            np.testing.assert_array_equal(one.logits(), whole[last])


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_saved_sequence_goes_on_to_the_last_bit(stories: dict[str, Path], tmp_path: Path, kv_dtype: str) -> None:
    file, n = tmp_path / "text.seq", 70
    with llmc.load(stories[kv_dtype], threads=1) as model:
        tokens = model.encode(" ".join(story.text for story in islice(tell_stories(held_out=True), 2)))[:100]
        whole = model.logits(tokens)
        with model.sequence() as sequence:
            sequence.feed(tokens[:n])
            sequence.save(file)
    with llmc.load(stories[kv_dtype], threads=2) as model, model.restore(file) as back:
        assert back.logits().tobytes() == whole[n - 1].tobytes()
        back.feed(tokens[n : n + 1])
        assert back.logits().tobytes() == whole[n].tobytes()
        assert back.feed_for_logits(tokens[n + 1 :]).tobytes() == whole[n + 1 :].tobytes()
    other = stories["bf16" if kv_dtype == "int8" else "int8"]
    with llmc.load(other) as model, pytest.raises(LlmcError, match="compiled with other options: its plan is another"):
        model.restore(file)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_what_a_page_has_held_changes_no_text(stories: dict[str, Path], tmp_path: Path, kv_dtype: str) -> None:
    """A file whose keys and values are no numbers: what was restored says nothing, and the next texts in its pages what
    they always say."""
    file, tokens = tmp_path / "text.seq", list(range(3, 103))
    with llmc.load(stories[kv_dtype], kv_tokens=192) as model:
        whole = model.logits(tokens)
        with model.sequence() as sequence:
            sequence.feed(tokens)
            sequence.save(file)
        data = file.read_bytes()
        pages = fmt.SAVED.size + 4 * (len(tokens) + model.info.n_vocab)
        file.write_bytes(hashed(data[:pages] + b"\xff" * (len(data) - pages)))
        for chunk in (100, 7, 1):
            with model.restore(file) as spoiled:
                spoiled.feed([3])
                assert np.isnan(spoiled.logits()).all()
            with model.sequence() as sequence:
                for start in range(0, 100, chunk):
                    sequence.feed(tokens[start : start + chunk])
                assert sequence.logits().tobytes() == whole[-1].tobytes()


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_a_float32_model_may_keep_a_narrower_cache(tmp_path: Path, kv_dtype: str) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=192,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    report = llmc.compile(tmp_path / "model", out=tmp_path / "tiny.so", dtype="f32", kv_dtype=kv_dtype, batch=(1,))
    assert report["certificate"]["status"] == "passed"
    assert report["certificate"]["quant"] == f"{kv_dtype} KV cache"

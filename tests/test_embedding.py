"""Models that make embeddings: those of transformers' own last norm, from Python, the command line and a server."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel, Qwen3Config

import llmc
from llmc.bench.chart.subjects import manifest_of
from llmc.cli.main import main
from llmc.runtime import LlmcError
from llmc.runtime.conversation import Conversation
from llmc.runtime.speculate import DraftModel
from tests.runtime.serve.conftest import Server, serving

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXTS = [[5, 17, 3], [3 + 7 * i % 150 for i in range(90)], [9], [5, 17, 4]]
LAST = {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True, "word_embedding_dimension": 64}
MEAN = {"pooling_mode": "mean"}
Row = np.ndarray[Any, Any]


def made_for_embeddings(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    """What sentence-transformers writes beside a model."""
    modules = ["Transformer", "Pooling", *more]
    paths = ["", "1_Pooling", *(f"{number}_{name}" for number, name in enumerate(more, 2))]
    kinds = [f"sentence_transformers.models.{name}" for name in modules]
    said = [{"path": path, "type": kind} for path, kind in zip(paths, kinds, strict=True)]
    (folder / "modules.json").write_text(json.dumps(said))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen")
    AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)).save_pretrained(path)
    made_for_embeddings(path, LAST, "Normalize")
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    report = llmc.compile(folder, out=folder / "last.so", dtype="f32", batch=(1, 4))
    certificate = report["certificate"]
    assert certificate["status"] == "passed"
    assert certificate["least_cosine"] > 1 - 1e-9
    return folder / "last.so"


def bare(folder: Path, to: Path) -> Path:
    """The model, without what sentence-transformers says of it."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*_Pooling", "modules.json", "*.so")))


def rows(model: PreTrainedModel, text: list[int]) -> Row:
    with torch.no_grad():
        found: Row = model.model(torch.tensor([text])).last_hidden_state[0].numpy()
    return found


def unit(row: Row) -> Row:
    length: Row = row / np.linalg.norm(row)
    return length


def test_an_embedding_is_what_the_last_norm_gives_at_the_last_token(folder: Path, artifact: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with llmc.load(artifact) as model:
        assert model.embedding is not None
        assert (model.embedding.size, model.embedding.pooling, model.embedding.normalized) == (64, "last", True)
        found = model.embed(TEXTS)
        for text, row in zip(TEXTS, found, strict=True):
            np.testing.assert_allclose(row, unit(rows(reference, text)[-1]), atol=2e-6)
            np.testing.assert_array_equal(model.embed([text])[0], row)  # alone as among others
        np.testing.assert_allclose(model.embed(TEXTS, 10)[1], unit(found[1, :10]), atol=1e-6)
        assert model.embed([]).shape == (0, 64)


def test_a_mean_is_over_all_tokens_and_has_its_own_length(folder: Path, tmp_path: Path) -> None:
    made_for_embeddings(bare(folder, tmp_path / "m"), MEAN)
    path = tmp_path / "mean.so"
    llmc.compile(tmp_path / "m", out=path, dtype="f32", batch=(1,))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = np.stack([rows(reference, text).mean(0) for text in TEXTS])
    with llmc.load(path) as model:
        np.testing.assert_allclose(model.embed(TEXTS), wanted, atol=1e-5)
    with serving(path) as server:
        said = server.ask("POST", "/v1/embeddings", {"input": TEXTS})[1]["data"]
    np.testing.assert_allclose([one["embedding"] for one in said], wanted, atol=1e-5)


def test_what_follows_the_head_does_not_matter_nor_that_the_checkpoint_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16})
    whole = AutoModelForCausalLM.from_config(config)
    whole.model.save_pretrained(tmp_path / "headless")
    options: dict[str, Any] = {"dtype": "bf16", "quant": "int8", "batch": (1,), "task": "embed"}
    report = llmc.compile(tmp_path / "headless", out=tmp_path / "a.so", **options)
    assert report["certificate"]["cosine_distance"] < 1e-3
    with llmc.load(tmp_path / "a.so") as model:
        assert unit(rows(whole, TEXTS[0])[-1]) @ model.embed(TEXTS[:1])[0] > 0.999


@pytest.mark.parametrize(
    ("pooling", "more", "said"),
    [
        ({"pooling_mode_cls_token": True}, (), "this model's are others"),
        ({**LAST, "pooling_mode_max_tokens": True}, (), "this model's are others"),
        (LAST, ("Dense",), "module 'Dense'"),
    ],
)
def test_other_embeddings_are_refused(
    folder: Path, tmp_path: Path, pooling: dict[str, Any], more: tuple[str, ...], said: str
) -> None:
    made_for_embeddings(bare(folder, tmp_path / "m"), pooling, *more)
    with pytest.raises(LlmcError, match=said) as error:
        llmc.compile(tmp_path / "m", out=tmp_path / "a.so")
    assert "--task generate" in str(error.value.hint)


def test_what_is_no_number_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtime.embedding.read", lambda *_: np.full((1, 64), np.inf, np.float32))
    with llmc.load(artifact) as model, pytest.raises(LlmcError, match="is not finite") as error:
        model.embed([[1]])
    assert str(error.value.place).endswith("(text 1)")


def test_texts_and_embeddings_are_not_mixed_up(folder: Path, artifact: Path, tmp_path: Path) -> None:
    with llmc.load(artifact) as model:
        with pytest.raises(LlmcError, match="this is one text, where several are read"):
            model.embed("a text")
        with pytest.raises(LlmcError, match="makes embeddings"):
            model.tokens([1, 2])
        with pytest.raises(LlmcError, match="makes embeddings"):
            Conversation(model)
        with pytest.raises(LlmcError, match="without tokens"):
            model.embed([[]])
        with pytest.raises(LlmcError, match="200 tokens; the model takes 192"):
            model.embed([[1] * 200])
        with pytest.raises(LlmcError, match="1 to 64 dimensions"):
            model.embed([[1]], 65)
        with pytest.raises(LlmcError, match="makes embeddings"):
            DraftModel(model, model)
    with pytest.raises(LlmcError, match="no decoding to measure"):
        manifest_of(artifact)
    llmc.compile(folder, out=tmp_path / "texts.so", dtype="f32", batch=(1,), task="generate", verify=False)
    with llmc.load(tmp_path / "texts.so") as model:
        assert len(model.tokens([1, 2], 3, ignore_eos=True)) == 3
        with pytest.raises(LlmcError, match="makes no embeddings"):
            model.embed([[1]])


def test_the_command_line_checks_and_makes_embeddings(folder: Path, artifact: Path) -> None:
    verified = CliRunner().invoke(main, ["verify", str(artifact), "--against", str(folder)])
    assert verified.exit_code == 0, verified.output
    refused = CliRunner().invoke(main, ["embed", str(artifact), "-p", "a text"])
    assert (refused.exit_code, "has no tokenizer" in refused.output) == (1, True)


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact) as server:
        yield server


def test_a_server_makes_embeddings_in_openais_form(server: Server, artifact: Path) -> None:
    with llmc.load(artifact) as model:
        wanted, cut = model.embed(TEXTS), model.embed(TEXTS[:1], 8)
    status, said = server.ask("POST", "/v1/embeddings", {"input": TEXTS, "model": "last"})
    assert status == 200, said
    np.testing.assert_array_equal(np.array([one["embedding"] for one in said["data"]], np.float32), wanted)
    assert said["usage"] == {"prompt_tokens": 97, "total_tokens": 97}
    body = {"input": TEXTS[0], "encoding_format": "base64", "dimensions": 8}
    [one] = server.ask("POST", "/v1/embeddings", body)[1]["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(one["embedding"]), "<f4"), cut[0])
    many = server.ask("POST", "/v1/embeddings", {"input": [[3, i] for i in range(100)]})[1]["data"]
    assert [one["index"] for one in many] == list(range(100))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": [[1], "a"]}, "input"),
        ("/v1/embeddings", {"input": [[]]}, "input"),
        ("/v1/embeddings", {"input": [1], "dimensions": 65}, "dimensions"),
        ("/v1/embeddings", {"input": [1], "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": [1], "stream": True}, "stream"),
        ("/v1/embeddings", {"input": [[1] * 300]}, "input"),
        ("/v1/completions", {"prompt": [1, 2]}, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, None),
    ],
)
def test_other_requests_are_refused(server: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    status, said = server.ask("POST", path, body)
    assert (status, said["error"]["param"]) == (400, param)

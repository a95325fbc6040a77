"""Encoders: models whose tokens see what is behind them, against transformers, from Python and from a server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    PreTrainedModel,
    XLMRobertaConfig,
)

import llmc
from llmc.cli.main import main
from llmc.compiler import driver
from llmc.compiler.frontend import load_source
from llmc.compiler.rewrite import rewrite
from llmc.runtime import LlmcError
from llmc.runtime.serve.server import Options, batch_of
from tests.runtime.serve.conftest import serving
from tests.test_embedding import Row, made_for_embeddings, unit

CONTEXT = 128
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
WINDOWS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**SIZES),
    "xlm-roberta": XLMRobertaConfig(
        **SIZES | {"pad_token_id": 1, "max_position_embeddings": CONTEXT + 2}, type_vocab_size=1
    ),
    "mpnet": MPNetConfig(**SIZES | {"pad_token_id": 1, "max_position_embeddings": CONTEXT + 2}),
    "modernbert": ModernBertConfig(**SIZES, local_attention=32, layer_types=WINDOWS),
    "gemma": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=20,
        layer_types=WINDOWS,
        use_bidirectional_attention=True,
    ),
}
TEXTS = [[5, 17, 3], [3 + 7 * i % 150 for i in range(CONTEXT)], [9], [5, 17, 4], [3 + 11 * i % 150 for i in range(70)]]


@pytest.fixture(autouse=True)
def _few_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for one size of steps, rather than ten."""
    few_bodies(monkeypatch)


def few_bodies(patch: pytest.MonkeyPatch, *rows: int) -> None:
    """Those of these rows, and one for the longest text."""
    patch.setattr(driver, "WHOLE_ROWS", dict.fromkeys(driver.WHOLE_ROWS, rows))
    patch.setattr(driver, "LEAST_WHOLE", dict.fromkeys(driver.LEAST_WHOLE, CONTEXT))


def save(family: str, to: Path) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(FAMILIES[family]).save_pretrained(to)
    return to


def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def states(model: PreTrainedModel, text: list[int]) -> Row:
    """transformers' own."""
    with torch.no_grad():
        found: Row = model(torch.tensor([text])).last_hidden_state[0].numpy()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_is_what_transformers_makes_of_the_whole_text(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "m")
    report = llmc.compile(folder, out=tmp_path / "m.so", dtype="f32", batch=(1,))
    assert report["certificate"]["status"] == "passed"
    own = reference(folder)
    with llmc.load(tmp_path / "m.so") as model:
        assert (model.info.n_context, model.info.n_vocab, model.info.n_tokens) == (CONTEXT, 64, 160)
        found = model.embed(TEXTS)
        for text, row in zip(TEXTS, found, strict=True):
            np.testing.assert_allclose(row, unit(states(own, text).mean(0)), atol=2e-6)
            np.testing.assert_array_equal(model.embed([text])[0], row)  # alone as among others
    with llmc.load(tmp_path / "m.so", threads=1) as model:
        np.testing.assert_array_equal(model.embed(TEXTS[::-1])[::-1], found)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("bert", tmp_path_factory.mktemp("bert"))


def test_an_old_checkpoint_has_other_names(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "old")
    tensors = load_file(bert / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {f"bert.{re.sub('|'.join(old), lambda found: old[found[0]], name)}": x for name, x in tensors.items()}
    assert "bert.embeddings.LayerNorm.gamma" in renamed
    save_file(renamed, tmp_path / "old/model.safetensors")
    weights = load_source(str(tmp_path / "old")).weights
    assert tensors.keys() - weights.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.stored(), tensors[name])


def with_modules(folder: Path, to: Path, pooling: dict[str, Any], *more: str) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.so"))
    made_for_embeddings(to, pooling, *more)
    return to


def dense(folder: Path, n_inputs: int, n_outputs: int, bias: bool, activation: str) -> dict[str, Row]:
    """A Dense module's files, and its weights."""
    folder.mkdir(exist_ok=True)
    settings = {"in_features": n_inputs, "out_features": n_outputs, "bias": bias}
    settings["activation_function"] = f"torch.nn.modules.{activation}"  # type: ignore[assignment]
    (folder / "config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(n_outputs)
    weights = {"linear.weight": random.normal(0, 0.3, (n_outputs, n_inputs)).astype(np.float32)}
    weights |= {"linear.bias": random.normal(0, 0.3, n_outputs).astype(np.float32)} if bias else {}
    save_file(weights, folder / "model.safetensors")
    return weights


def test_what_sentence_transformers_does_behind_the_model_is_done(bert: Path, tmp_path: Path) -> None:
    """Of the first token, through two products, of which the last has more elements than there are tokens."""
    folder = with_modules(bert, tmp_path / "m", {"pooling_mode_cls_token": True}, "Dense", "Dense", "Normalize")
    first = dense(folder / "2_Dense", 64, 24, True, "activation.Tanh")
    second = dense(folder / "3_Dense", 24, 200, False, "linear.Identity")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100}))
    report = llmc.compile(folder, out=tmp_path / "m.so", dtype="bf16", quant="int8", batch=(1,))
    assert report["certificate"]["cosine_distance"] < 1e-3
    llmc.compile(folder, out=tmp_path / "m.so", dtype="f32", batch=(1,))
    with llmc.load(tmp_path / "m.so") as model:
        assert (model.info.n_context, model.info.n_vocab) == (100, 200)
        texts, own = [text[:100] for text in TEXTS], reference(folder)
        for text, row in zip(texts, model.embed(texts), strict=True):
            y = np.tanh(states(own, text)[0] @ first["linear.weight"].T + first["linear.bias"])
            np.testing.assert_allclose(row, unit(y @ second["linear.weight"].T), atol=3e-6)
        with pytest.raises(LlmcError, match="a text has 101 tokens; the model takes 100"):
            model.embed([[1] * 101])


@pytest.mark.parametrize(
    ("pooling", "more", "said"),
    [
        ({"pooling_mode_max_tokens": True}, (), "this model's are others"),
        ({"pooling_mode": "mean"}, ("Normalize", "Dense"), "in another order than is compiled"),
        ({"pooling_mode": "mean"}, ("CNN",), "module 'CNN'"),
        ({"pooling_mode": "mean", "include_prompt": False}, (), "leaves out a prompt's tokens"),
        ({"pooling_mode": "mean"}, ("Dense",), "a Dense module takes 63 elements; it is given 64"),
    ],
)
def test_other_modules_are_refused(
    bert: Path, tmp_path: Path, pooling: dict[str, Any], more: tuple[str, ...], said: str
) -> None:
    folder = with_modules(bert, tmp_path / "m", pooling, *more)
    dense(folder / "2_Dense", 63, 8, False, "linear.Identity")
    with pytest.raises(LlmcError, match=said):
        load_source(str(folder))


def test_what_an_encoder_cannot_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="makes embeddings, and writes no texts"):
        load_source(str(bert), task="generate")
    AutoModel.from_config(DebertaV2Config(**SIZES)).save_pretrained(tmp_path / "deberta")
    with pytest.raises(LlmcError, match=r"DebertaV2Model is not supported"):
        rewrite(load_source(str(tmp_path / "deberta")), None, None)


def write_tokenizer(folder: Path) -> None:
    """Words as BERT has them, between [CLS] and [SEP]; it says that texts are cut, and filled up, as many files do."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "##s", *(f"w{i}" for i in range(153))]
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def artifact(bert: Path) -> Path:
    write_tokenizer(bert)
    with pytest.MonkeyPatch.context() as patch:
        few_bodies(patch, 16)
        llmc.compile(bert, out=bert / "m.so", dtype="f32", batch=(1,))
    return bert / "m.so"


def test_a_text_is_one_input_of_an_empty_sequence(artifact: Path) -> None:
    with llmc.load(artifact) as model, model.sequence() as sequence, model.sequence() as other:
        whole = sequence.feed_for_logits(TEXTS[4])
        np.testing.assert_array_equal(sequence.logits(), whole[-1])
        assert whole.shape == (70, 64)
        with pytest.raises(LlmcError, match="reads a text whole, and input 0 of the step is to go on after 70 tokens"):
            sequence.feed([1])
        with pytest.raises(LlmcError, match="input 1 of the step is to go on"):
            model.step([(other, [1]), (sequence, [1])])
        assert (sequence.length, other.length) == (70, 0)
        sequence.truncate(0)
        sequence.feed(TEXTS[0])
        other.feed(TEXTS[0])
        np.testing.assert_array_equal(sequence.logits(), other.logits())
        with pytest.raises(LlmcError, match="chooses no tokens"):
            sequence.sample()
        with pytest.raises(LlmcError, match="token 160 is out of range"):
            other.feed([160])
        with pytest.raises(LlmcError, match="writes no texts"):
            model.tokens([1, 2])


def test_the_command_line_makes_embeddings_and_replays_the_certificate(bert: Path, artifact: Path) -> None:
    verified = CliRunner().invoke(main, ["verify", str(artifact), "--against", str(bert)])
    assert verified.exit_code == 0, verified.output
    said = CliRunner().invoke(main, ["embed", str(artifact), "-p", "One twos one", "-p", "w9", "--json"])
    assert said.exit_code == 0, said.output
    with llmc.load(artifact) as model:
        assert model.encode("One twos one") == [2, 4, 5, 6, 4, 3]
        wanted = model.embed([[2, 4, 5, 6, 4, 3], [2, 16, 3]])
        np.testing.assert_array_equal(np.array(json.loads(said.output)["embeddings"], np.float32), wanted)
    lines = CliRunner().invoke(main, ["embed", str(artifact)], input="One twos one\n\nw9\n").stdout.splitlines()
    assert len(lines) == 3  # an empty one is a text too: each has its line
    np.testing.assert_allclose(np.array(lines[2].split(), np.float32), wanted[1], rtol=1e-6)
    inspected = CliRunner().invoke(main, ["inspect", str(artifact), "--schedules"])
    assert (inspected.exit_code, "fallback" in inspected.output) == (0, False), inspected.output


@pytest.fixture(scope="module")
def answers(artifact: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    texts = [*TEXTS, *([3, i, 4] for i in range(100)), TEXTS[1]]
    with llmc.load(artifact) as model:
        wanted = model.embed(texts)
    with serving(artifact) as server:
        status, said = server.ask("POST", "/v1/embeddings", {"input": texts})
        assert status == 200, said
        assert server.ask("POST", "/v1/completions", {"prompt": "one"})[0] == 400
        longer = server.ask("POST", "/v1/embeddings", {"input": [1] * (CONTEXT + 1)})
        assert (longer[0], longer[1]["error"]["param"]) == (400, "input")
        yield wanted, said


def test_a_server_takes_more_texts_into_a_step_that_reads_them_whole() -> None:
    for kind in ("embedding", "classification"):
        assert batch_of({"batch": [1, 8], kind: {"whole": True}}, Options()) == 32
        assert batch_of({"batch": [1, 64], kind: {"whole": True}}, Options()) == 64
        assert batch_of({"batch": [1], kind: {"whole": False}}, Options()) == 8
        assert batch_of({"batch": [1], kind: {"whole": True}}, Options(max_batch=3)) == 3


def test_a_server_reads_texts_whole_and_keeps_nothing_of_them(answers: tuple[Row, dict[str, Any]]) -> None:
    wanted, said = answers
    found = np.array([one["embedding"] for one in said["data"]], np.float32)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found[1], found[-1])

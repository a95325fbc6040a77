"""Rerankers and classifiers: labels of texts and of pairs, against transformers, from Python, the command line and a
server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Qwen3Config

import llmc
from llmc.bench.chart.subjects import manifest_of
from llmc.cli.main import main
from llmc.compiler.certificate.labels import compare, judge
from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.classification import activation_of, as_task, classification_of, reads_types
from llmc.compiler.frontend.find_model import Found, for_task
from llmc.compiler.frontend.gguf.file import GgufFile
from llmc.compiler.frontend.graph_cache import exported_graph
from llmc.compiler.graph import add_constant, emit
from llmc.runtime import LlmcError
from llmc.runtime.speculate import DraftModel
from tests.runtime.serve.conftest import Server, serving
from tests.test_embedding import SIZES, made_for_embeddings
from tests.test_encoders import CONTEXT, FAMILIES, TEXTS, few_bodies, write_tokenizer

Row = np.ndarray[Any, Any]
LABELS = {
    "bert": (FAMILIES["bert"], 3),
    "xlm-roberta": (FAMILIES["xlm-roberta"], 1),
    "modernbert": (FAMILIES["modernbert"], 2),
    "qwen3": (Qwen3Config(**SIZES), 2),
}
"""Of encoders' first token, through a pooler or not; of the mean; of a decoder's last token."""


@pytest.fixture(autouse=True)
def _few_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    few_bodies(monkeypatch)


def save(family: str, to: Path, n_labels: int = 0, **settings: Any) -> Path:
    """A small model with random weights; its head's are large, so that labels differ."""
    config, n = LABELS[family]
    fields = config.to_dict() | {"num_labels": n_labels or n, "classifier_pooling": "mean"} | settings
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(type(config)(**fields))
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "score")):
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(to)
    return to


def reference(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def logits(model: PreTrainedModel, text: list[int], types: list[int] | None = None) -> Row:
    """transformers' own of a text: alone, so that nothing is filled up."""
    given = {} if types is None else {"token_type_ids": torch.tensor([types])}
    model.config.pad_token_id = None
    with torch.no_grad():
        found: Row = model(torch.tensor([text]), **given).logits[0].numpy()
    return found


@pytest.mark.parametrize("family", LABELS)
def test_labels_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path / "m")
    report = llmc.compile(folder, out=tmp_path / "m.so", dtype="f32", batch=(1,))
    assert report["certificate"]["status"] == "passed"
    own = reference(folder)
    with llmc.load(tmp_path / "m.so") as model:
        n_types = 2 if family == "bert" else 1
        assert (model.info.n_vocab, model.info.n_tokens, model.info.n_types) == (LABELS[family][1], 160, n_types)
        found = model.classify(TEXTS, raw=True)
        for text, row in zip(TEXTS, found, strict=True):
            np.testing.assert_allclose(row, logits(own, text), atol=2e-5)
            np.testing.assert_array_equal(model.classify([text], raw=True)[0], row)  # alone as among others


def test_a_server_asks_a_decoder_too(tmp_path: Path) -> None:
    """Which reads a text in pieces, and keeps what texts begin with."""
    write_tokenizer(save("qwen3", tmp_path / "m", 1))
    llmc.compile(tmp_path / "m", out=tmp_path / "m.so", dtype="f32", batch=(1,), verify=False)
    documents = [f"one two w{number}" for number in range(3, 23)]
    with llmc.load(tmp_path / "m.so") as model:
        wanted = model.rank(QUERY, documents)
    with serving(tmp_path / "m.so") as server:
        said = server.ask("POST", "/rerank", {"query": QUERY, "texts": documents})[1]
    assert [(one["index"], one["score"]) for one in said] == wanted


def test_a_reference_of_texts_with_all_tokens_there_are_is_that_of_each_alone(tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path / "m")
    texts = [[7, 0, 1, 2], list(range(160))[::-1], [0, 5]]
    found = reference_logits(load_source(str(folder), dtype="f32"), texts)
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(row[0], logits(reference(folder), text), atol=2e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker that tells a query's tokens from a document's."""
    said = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}, "id2label": {0: "fits"}}
    path = save("bert", tmp_path_factory.mktemp("reranker"), 1, **said)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        few_bodies(patch)
        llmc.compile(folder, out=folder / "m.so", dtype="f32", batch=(1,))
    return folder / "m.so"


QUERY, DOCUMENTS = "one w9", ["w3 ones", "two w11 w12 one", "w9"]


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[float]:
    """transformers' own scores, of the tokens that BERT's tokenizer makes of pairs, and their types."""
    pairs = [[2, 4, 16, 3, 10, 4, 6, 3], [2, 4, 16, 3, 5, 18, 19, 4, 3], [2, 4, 16, 3, 16, 3]]
    own = reference(folder)
    rows = [logits(own, pair, [0] * 4 + [1] * (len(pair) - 4)) for pair in pairs]
    return [float(1 / (1 + np.exp(-row[0]))) for row in rows]


def test_pairs_have_types_and_the_best_document_comes_first(folder: Path, artifact: Path, wanted: list[float]) -> None:
    with llmc.load(artifact) as model:
        pairs = [(QUERY, document) for document in DOCUMENTS]
        np.testing.assert_allclose(model.classify(pairs)[:, 0], wanted, atol=1e-5)
        ranked = model.rank(QUERY, DOCUMENTS, 2)
        order = sorted(range(3), key=lambda index: -wanted[index])[:2]
        assert [index for index, _ in ranked] == order
        typed = [token + 160 * kind for token, kind in zip([2, 4, 3, 5, 3], [0, 0, 0, 1, 1], strict=True)]
        np.testing.assert_array_equal(model.classify([typed]), model.classify([("one", "two")]))
        assert not np.array_equal(model.classify([typed]), model.classify([[2, 4, 3, 5, 3]]))
        with pytest.raises(LlmcError, match=rf"a text has 130 tokens; the model takes {CONTEXT}") as error:
            model.rank("one", ["two", "one " * 126])
        assert str(error.value.place).endswith("(text 2)")
        assert error.value.hint == "--truncate, or truncate=True, cuts it"
        for n_first in (125, 200):  # which leaves the second no room, or less
            with pytest.raises(LlmcError, match=f"a text has {n_first + 4} tokens") as error:
                model.rank("one " * n_first, ["two w9", "w3"], truncate=True)
            assert error.value.hint == "the first of the two is too long by itself"
        with pytest.raises(LlmcError, match="this is one text, where several are read"):
            model.classify("one")
        with pytest.raises(LlmcError, match="this is one text, where several are read"):
            model.rank("one", "two")
        with pytest.raises(LlmcError, match="a ranking has at least 1 document, not -1"):
            model.rank("one", ["two", "w9"], -1)
        cut = model.rank("one", ["one " * 126], truncate=True)
        assert cut == model.rank("one", ["one " * 124])
        with pytest.raises(LlmcError, match="gives texts labels, and makes no embeddings"):
            model.embed(["one"])
        with pytest.raises(LlmcError, match="gives texts labels, and writes none"):
            model.tokens([1, 2])
        with pytest.raises(LlmcError, match="gives texts labels, and writes none"):
            DraftModel(model, model)
    with pytest.raises(LlmcError, match="no decoding to measure"):
        manifest_of(artifact)


def test_what_is_no_number_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([[1], [np.nan]], np.float32)
    monkeypatch.setattr("llmc.runtime.classification.read", lambda *_: rows)
    with llmc.load(artifact) as model, pytest.raises(LlmcError, match="is not finite") as error:
        model.rank("one", ["two", "w9"])
    assert str(error.value.place).endswith("(text 2)")


def test_a_tokenizer_that_says_no_types_gives_none(folder: Path, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({"model_input_names": ["input_ids"]}))
    assert not reads_types(tmp_path / "m")
    llmc.compile(tmp_path / "m", out=tmp_path / "m.so", dtype="f32", batch=(1,))
    with llmc.load(tmp_path / "m.so") as model, llmc.load(artifact) as typed:
        np.testing.assert_array_equal(model.classify([("one", "two")]), typed.classify([[2, 4, 3, 5, 3]]))


def test_the_command_line_ranks_and_classifies(folder: Path, artifact: Path, wanted: list[float]) -> None:
    run = CliRunner()
    verified = run.invoke(main, ["verify", str(artifact), "--against", str(folder)])
    assert verified.exit_code == 0, verified.output
    documents = [part for document in DOCUMENTS for part in ("-p", document)]
    said = run.invoke(main, ["rank", str(artifact), "-q", QUERY, *documents, "--json"])
    assert said.exit_code == 0, said.output
    results = json.loads(said.output)["results"]
    assert {one["text"]: pytest.approx(one["score"], abs=1e-5) for one in results} == dict(
        zip(DOCUMENTS, wanted, strict=True)
    )
    lines = run.invoke(main, ["rank", str(artifact), "-q", QUERY, "--top", "1"], input="\n".join(DOCUMENTS)).output
    assert lines == f"{max(wanted):.4g}\t{results[0]['index']}\t{results[0]['text']}\n"
    labelled = run.invoke(main, ["classify", str(artifact), "--pair", QUERY, DOCUMENTS[0], "-p", "one"]).output
    assert [line.split()[0] for line in labelled.splitlines()] == ["fits", "fits"]
    assert labelled.splitlines()[1] == f"fits {wanted[0]:.4g}"
    assert "labels       fits; scores by sigmoid" in run.invoke(main, ["inspect", str(artifact)]).output
    for command in (["classify"], ["rank", "-q", "one"]):
        broken = run.invoke(main, [command[0], str(artifact), *command[1:]], input=b"one\n\xff\n")
        assert (broken.exit_code, broken.output.splitlines()[0]) == (1, "error: the text is no valid Unicode")
        assert "(text 2)" in broken.output
    refused = run.invoke(main, ["classify", str(artifact), "-p", "one " * 200])
    assert (refused.exit_code, "the model takes 128" in refused.output) == (1, True)


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    with serving(artifact) as server:
        yield server


def test_a_server_ranks_as_others_do(server: Server, wanted: list[float]) -> None:
    documents: list[Any] = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:], *(f"w{i}" for i in range(100))]
    body = {"query": QUERY, "documents": documents, "return_documents": True}
    status, said = server.ask("POST", "/v1/rerank", body)
    assert (status, len(said["results"])) == (200, 103), said
    scores = [one["relevance_score"] for one in said["results"]]
    assert scores == sorted(scores, reverse=True)
    by_index = {one["index"]: one for one in said["results"]}
    np.testing.assert_allclose([by_index[i]["relevance_score"] for i in range(3)], wanted, atol=1e-5)
    assert by_index[1]["document"] == {"text": DOCUMENTS[1]}
    first = server.ask("POST", "/v2/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": 1})[1]["results"]
    assert [one.keys() for one in first] == [{"index", "relevance_score"}]
    tei = server.ask("POST", "/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "return_text": True})[
        1
    ]
    best = int(np.argmax(wanted))
    assert (tei[0]["index"], tei[0]["text"]) == (best, DOCUMENTS[best])
    assert tei[0]["score"] == pytest.approx(np.log(wanted[best] / (1 - wanted[best])), abs=1e-4)


def test_a_server_classifies(server: Server, wanted: list[float]) -> None:
    said = server.ask("POST", "/classify", {"input": ["one", [QUERY, DOCUMENTS[0]]]})[1]["data"]
    assert [one["label"] for one in said] == ["fits", "fits"]
    assert said[1]["probs"] == [pytest.approx(wanted[0], abs=1e-5)]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"documents": ["one"]}, "query"),
        ("/v1/rerank", {"query": "one", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "one", "documents": ["one", {"image": "x"}]}, "documents"),
        ("/v1/rerank", {"query": "one", "documents": ["one " * 127]}, "documents"),
        ("/v1/rerank", {"query": "one", "documents": ["one"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "one " * 125, "documents": ["two w9"], "truncate": True}, "documents"),
        ("/v1/rerank", {"query": "w" * 100_000, "documents": ["two"], "truncate": True}, "documents"),
        ("/rerank", {"query": "one", "texts": ["one"], "truncation_direction": "left"}, "truncation_direction"),
        ("/classify", {"input": [["one", "two", "three"]]}, "input"),
        ("/classify", {"input": []}, "input"),
        ("/v1/embeddings", {"input": "one"}, None),
        ("/v1/completions", {"prompt": "one"}, None),
    ],
)
def test_other_requests_are_refused(server: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    status, said = server.ask("POST", path, body)
    assert (status, said["error"]["param"]) == (400, param), said


def test_more_than_one_label_is_no_rank(tmp_path: Path) -> None:
    save("bert", tmp_path / "m")
    write_tokenizer(tmp_path / "m")
    report = llmc.compile(tmp_path / "m", out=tmp_path / "m.so", dtype="bf16", quant="int8", batch=(1,))
    assert report["certificate"]["error_share"] < 0.05
    with llmc.load(tmp_path / "m.so") as model:
        np.testing.assert_allclose(model.classify(["one", "two"]).sum(1), 1, atol=1e-6)
        with pytest.raises(LlmcError, match="gives 3 labels, where a document's rank is of one"):
            model.rank("one", ["two"])
    with serving(tmp_path / "m.so") as server:
        assert server.ask("POST", "/v1/rerank", {"query": "one", "documents": ["two"]})[0] == 400


def test_what_is_asked_for_goes_before_what_the_files_say(tmp_path: Path) -> None:
    folder = save("bert", tmp_path / "m")
    assert load_source(str(folder)).classification is not None
    embeds = load_source(str(folder), task="embed")
    assert (embeds.classification, embeds.embedding is not None) == (None, True)
    made_for_embeddings(folder, {"pooling_mode": "mean"})
    assert load_source(str(folder)).embedding is not None
    assert load_source(str(folder), task="classify").classification is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sbert_ce_default_activation_function": "my.Own"}))
    with pytest.raises(LlmcError, match=r"scores that go through my\.Own are not compiled") as error:
        load_source(str(folder), task="classify")
    assert (error.value.place, error.value.hint) == (str(folder), "--task embed, or generate, leaves its head aside")
    assert as_task({"architectures": ["BertModel"]}, None, "classify") == {
        "architectures": ["BertModelForSequenceClassification"]
    }
    with pytest.raises(LlmcError, match=r"lacks the tensor 'classifier\.weight'"):
        load_source(str(save_bare(tmp_path / "bare")), task="classify")


def test_heads_that_are_not_known_are_refused(tmp_path: Path) -> None:
    fields = json.loads((save("xlm-roberta", tmp_path / "m") / "config.json").read_text())

    def changed() -> tuple[ir.Model, ir.Node]:
        """The graph, and the node that takes a text's first token."""
        model = exported_graph(fields, "m")
        return model, next(node for node in model.graph if node.op_type == "Gather" and node.attributes["axis"].value)

    model, first = changed()
    first.replace_input_with(1, add_constant(model.graph, np.array(1), "second"))
    with pytest.raises(LlmcError, match="of neither a text's first token, nor its last, nor the mean over all"):
        classification_of(model, fields, None)
    model, first = changed()
    first.replace_input_with(1, add_constant(model.graph, np.array(-1), "last"))
    with pytest.raises(LlmcError, match="labels of an encoder that are made of its last token are not compiled"):
        classification_of(model, fields, None)
    model, first = changed()
    twice = emit(first, "Gather", list(first.inputs), axis=1)[0]
    model.graph.append(ir.Node("", "Add", [twice, first.outputs[0]]))
    with pytest.raises(LlmcError, match="what 2 poolings give"):
        classification_of(model, fields, None)
    model.graph.outputs[0].shape = ir.Shape(["batch", "labels"])
    with pytest.raises(LlmcError, match="its head gives no fixed number of labels"):
        classification_of(model, fields, None)
    model.graph.append(ir.Node("llmc", "CausalConv", []))
    with pytest.raises(LlmcError, match="whose layers have a state"):
        classification_of(model, fields, None)


def test_other_files_give_no_labels(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"an \.onnx file is compiled as it is"):
        load_source(str(tmp_path / "m.onnx"), task="classify")
    with pytest.raises(LlmcError, match="gives labels to more than texts"):
        for_task(Found("m", None, {}, None, is_part=True, labels=True), "auto")
    with pytest.raises(LlmcError, match="a GGUF file is compiled without a head for labels"):
        for_task(Found("m", None, {}, None, gguf=GgufFile.__new__(GgufFile)), "classify")


def save_bare(to: Path) -> Path:
    from transformers import AutoModel

    AutoModel.from_config(FAMILIES["bert"]).save_pretrained(to)
    return to


def test_what_scores_are_made_by() -> None:
    assert activation_of({}, 1) == activation_of({"problem_type": "multi_label_classification"}, 3) == "sigmoid"
    assert activation_of({}, 3) == "softmax"
    assert activation_of({"problem_type": "regression"}, 1) == "identity"
    old = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity", "problem_type": "other"}
    assert activation_of(old, 1) == "identity"
    with pytest.raises(LlmcError, match=r"scores that go through my\.Own are not compiled"):
        activation_of({"sentence_transformers": {"activation_fn": "my.Own"}}, 1)


def test_certificates_have_bars() -> None:
    exact = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    texts = [[1]] * 40
    for factor, dtype in ((1e-6, "f32"), (1e-2, "bf16")):
        judge(
            compare(texts, exact * (1 + factor), exact, exact * (1 - factor) if dtype == "bf16" else None, dtype), "m"
        )
    with pytest.raises(LlmcError, match="of the largest logit, the bar is 2e-04"):
        judge(compare(texts, exact * 1.001, exact, None, "f32"), "m")
    with pytest.raises(LlmcError, match=r"a typical error is 2\.00 times the reference's own in bf16"):
        judge(compare(texts, exact * 1.02, exact, exact * 1.01, "bf16"), "m")
    with pytest.raises(LlmcError, match=r"the bar of int8 is 0\.05"):
        judge(compare(texts, exact * 1.06, exact, None, "bf16") | {"quant": "int8"}, "m")

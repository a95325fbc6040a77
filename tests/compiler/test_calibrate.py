"""Which tokens weights are fitted to, what is refused, and that fitting them pays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc import passes
from llmc.compiler.driver import compile_model
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.graph.stream import Stream
from llmc.compiler.quantization import calibrate, quantize
from llmc.compiler.quantization.calibrate import Calibration, fit_weights
from llmc.compiler.quantization.quantize import Quantized, QuantizedWeight, Scheme
from llmc.compiler.weights import Weight
from llmc.passes.quantize_weights import quantize_weights
from llmc.runtime.errors import LlmcError

TinyModel = Callable[[str], Path]
STORIES = Path(__file__).parents[2] / "examples" / "stories" / "model"
SENTENCE = "Once upon a time there was a fox named Clover. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(SENTENCE * 100, encoding="utf-8")
    return path


def ids(path: Path, tokens: Any) -> Path:
    path.write_text(json.dumps(tokens))
    return path


def random_ids(n: int, seed: int = 0) -> list[int]:
    """Tokens as texts have them: a few are common."""
    return [int(token) % 131 for token in np.random.default_rng(seed).zipf(1.3, n)]


# -- the text ------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_sequences_that_begin_as_texts_do(text: Path) -> None:
    source = load_source(str(STORIES))
    found = calibrate.read(text, source)
    assert [len(tokens) for tokens in found.sequences[:-1]] == [512] * (len(found.sequences) - 1)
    assert all(tokens[0] == source.bos for tokens in found.sequences)
    assert not any((tokens[1:] == source.bos).any() for tokens in found.sequences)
    assert found.record == {
        "method": "gptq",
        "damping": 0.1,
        "tokens": sum(map(len, found.sequences)),
        "sequences": len(found.sequences),
        "file": "stories.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("listed", [[5] * 200, [[5] * 90, [7] * 110]], ids=["one sequence", "sequences"])
def test_token_ids_are_read_from_json(listed: Any, tiny_model: TinyModel, tmp_path: Path) -> None:
    found = calibrate.read(ids(tmp_path / "ids.json", listed), load_source(str(tiny_model("llama"))))
    lengths = [96, 96, 8] if listed[0] == 5 else [90, 96, 14]
    assert [len(tokens) for tokens in found.sequences] == lengths


def test_of_a_long_text_sequences_are_taken_at_even_distances() -> None:
    sequences = [np.full(100, i) for i in range(10)]
    assert [tokens[0] for tokens in calibrate.spread(sequences, 500)] == [0, 2, 4, 6, 8]
    assert [tokens[0] for tokens in calibrate.spread(sequences, 1)] == [0]
    assert len(calibrate.spread(sequences, 1000)) == 10


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "the calibration text does not exist"),
        (b"", "the calibration text is empty"),
        (b"\xff\xfe\x00" * 200, "the calibration text is not UTF-8"),
        (b"Once upon a time", r"\d tokens are too few to calibrate with"),
    ],
)
def test_a_text_that_is_of_no_use_is_refused(content: bytes | None, fact: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlmcError, match=fact) as caught:
        compile_model(STORIES, out=tmp_path / "m.so", quant="int4", calibrate=path)
    assert caught.value.place == f"--calibrate {path}"


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("[1, 2", "the file is not JSON"),
        ('{"a": 1}', "the file holds no list of token ids"),
        ("[1.5, 2]", "the file holds no list of token ids"),
        ("[]", "0 tokens are too few"),
        (json.dumps([1] * 200 + [131]), "the model has 131 tokens, and none of the id 131"),
        (json.dumps([-1] * 200), "none of the id -1"),
    ],
)
def test_ids_that_are_of_no_use_are_refused(content: str, fact: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(content)
    with pytest.raises(LlmcError, match=fact):
        compile_model(tiny_model("llama"), out=tmp_path / "m.so", quant="int4", calibrate=path)


def test_a_text_says_nothing_to_a_model_without_a_tokenizer(text: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(LlmcError, match="no tokenizer to read a text with") as caught:
        calibrate.read(text, load_source(str(tiny_model("llama"))))
    assert ".json" in str(caught.value.hint)


def test_calibrating_what_is_not_quantised_is_refused_before_any_work(text: Path) -> None:
    with pytest.raises(LlmcError, match="--calibrate says how to quantise, but nothing is"):
        compile_model("no such model", calibrate=text)
    with pytest.raises(LlmcError, match="is not a file"):
        compile_model("no such model", quant="int4", calibrate=text.parent)


# -- the weights ---------------------------------------------------------------------------------------------------


def prepared(folder: Path, scheme: Scheme, n_tokens: int = 600) -> tuple[ir.Model, Calibration]:
    """A step graph with quantised weights, and tokens for it."""
    source: SourceModel = load_source(str(folder), weights="random")
    model = passes.run(source.graph, n_context=source.n_context)
    quantize_weights(model, scheme)
    sequences = calibrate.cut([random_ids(n_tokens)], [], source.n_context)
    return model, Calibration("ids.json", "", tuple(sequences))


def weights_of(model: ir.Model) -> list[QuantizedWeight]:
    found = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in found if isinstance(tensor, QuantizedWeight)]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32, lm_head=True), Scheme(4, 128)], ids=str)
def test_every_layer_loses_less_on_tokens_it_has_not_seen(family: str, scheme: Scheme, tiny_model: TinyModel) -> None:
    model, calibration = prepared(tiny_model(family), scheme)
    plain = model.clone()
    fit_weights(model, calibration)
    fitted = {weight.name: weight.quantized().values() for weight in weights_of(model)}
    stream = Stream(plain.graph, [np.array(random_ids(90, seed=seed)) for seed in range(1, 6)])
    shares = []
    for node in plain.graph:
        weight = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if not isinstance(weight, QuantizedWeight) or node.inputs[0] is None:
            stream.run(node)
            continue
        x = np.concatenate(stream.values[node.inputs[0]])
        exact = weight.source.numpy()
        rounded = quantize.quantize(exact, scheme).values()
        shares.append(np.square(x @ (fitted[weight.name] - exact).T).sum() / np.square(x @ (rounded - exact).T).sum())
        stream.run(node, {node.inputs[1]: exact} if node.inputs[1] is not None else None)
    assert len(shares) == len(fitted) >= 8
    assert max(shares) < 1
    assert np.mean(shares) < 0.9


def test_weights_may_be_read_in_any_order_and_again(tiny_model: TinyModel) -> None:
    model, calibration = prepared(tiny_model("llama"), Scheme(4, 32))
    fit_weights(model, calibration)
    weights = weights_of(model)
    codes = [weight.quantized().codes for weight in weights]
    for weight, expected in reversed(list(zip(weights, codes, strict=True))):
        np.testing.assert_array_equal(weight.quantized().codes, expected)
    np.testing.assert_array_equal(weights[0].numpy(), weights[0].quantized().values())


@pytest.mark.parametrize(("kept_bytes", "n_runs"), [(1 << 20, 1), (0, 2)])
def test_each_weight_is_fitted_once_in_order_and_in_any_order_while_codes_fit_in_memory(
    kept_bytes: int, n_runs: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = prepared(tiny_model("llama"), Scheme(4, 32))
    fit_weights(model, calibration)
    fitted, seen = calibrate.fitted, []

    def count(weight: QuantizedWeight, inputs: Any) -> Quantized:
        seen.append(weight.name)
        return fitted(weight, inputs)

    monkeypatch.setattr(calibrate, "fitted", count)
    monkeypatch.setattr(calibrate, "KEPT_BYTES", kept_bytes)
    weights = weights_of(model)
    for weight in weights:
        weight.quantized()
    assert seen == [weight.name for weight in weights]
    seen.clear()
    fit_weights(model, calibration)
    for weight in [weights[-1], *weights[:-1]]:  # as a table that makes the logits too
        weight.quantized()
    assert seen[: len(weights)] == [weight.name for weight in weights]
    assert len(seen) == n_runs * len(weights) - (n_runs - 1)  # the second run ends before the last


def test_a_weight_that_is_codes_and_scales_already_is_not_fitted() -> None:
    random, scheme = np.random.default_rng(0), Scheme(4, 32)
    array = random.integers(-8, 8, (80, 64)).astype(np.float32) * np.float32(0.03125)
    kept = calibrate.own(array, QuantizedWeight(Weight.of_array("w", array), scheme))
    assert kept is not None
    np.testing.assert_array_equal(kept.values(), array)
    array[70] = random.normal(size=64)
    assert calibrate.own(array, QuantizedWeight(Weight.of_array("w", array), scheme)) is None


def test_an_artifact_says_what_it_was_fitted_to_and_is_the_same_each_time(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from llmc.runtime.artifact import ArtifactFile

    n_context = 31  # less than a prefill chunk, whose kernels need not be compiled then
    folder, path, out = tiny_model("llama"), ids(tmp_path / "ids.json", random_ids(400)), tmp_path / "m.so"
    record = calibrate.read(path, load_source(str(folder), max_sequence=n_context)).record
    digests = []
    for file in (path, path, None):
        report = compile_model(folder, out=out, quant="int4", batch=(1,), max_sequence=n_context, calibrate=file)
        assert report["certificate"]["status"] == "passed"
        with ArtifactFile.open(out) as artifact:
            digests.append(artifact.sections["weights"].sha256)
            said = artifact.manifest()["quant"]["calibration"]
        assert said == (None if file is None else record)
    assert digests[0] == digests[1] != digests[2]

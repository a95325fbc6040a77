"""`llmc bench` on real models of two layers: the weights are the same, contexts are copied, both sides measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import llmc
from llmc.bench import limits
from llmc.bench.chart import hf, onnxruntime_, subjects
from llmc.bench.chart.request import Request
from llmc.bench.peers.protocol import Loading
from llmc.cli.main import main
from llmc.runtime import LlmcError
from tests.bench.chart_fakes import MANIFEST
from tests.runtime.stub_artifact import manifest, plan_section, write_stub

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
PROMPT = [(7 * i) % 157 + 3 for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    path = folder / "small.so"
    llmc.compile(folder, out=path, weights="random", dtype="f32", batch=(1, 2), verify=False)
    return path


def test_hugging_face_has_the_weights_that_llmc_compiled(folder: Path, artifact: Path) -> None:
    model = hf.load_model(Loading(folder, CONFIG, "f32", 1, 256, (1,)))
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
    with llmc.load(artifact) as ours:
        assert np.abs(ours.logits(PROMPT) - wanted).max() < 2e-4 * np.ptp(wanted)


def test_onnx_runtime_says_the_tokens_that_llmc_says(
    folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_, "files_folder", lambda: tmp_path)
    system = onnxruntime_.OnnxRuntime()
    system.load(Loading(folder, CONFIG, "f32", 1, 192, (1,)))
    assert not list(tmp_path.iterdir())
    caches = system.empty(1)
    system.step(np.array([PROMPT[:30]]), 0, caches)
    tokens = [system.step(np.array([PROMPT[30:]]), 30, caches)]
    tokens += [system.step(tokens[-1], len(PROMPT), caches)]
    with llmc.load(artifact) as ours:
        assert [int(token[0, 0]) for token in tokens] == ours.tokens(PROMPT, max_tokens=2, ignore_eos=True)
    assert len(system.repeated(PROMPT, 2, 150, 3)) == 3


def test_a_repeated_sequence_says_what_the_original_says(artifact: Path) -> None:
    with llmc.load(artifact, threads=1, kv_tokens=1024) as model, model.sequence() as original:
        original.feed(PROMPT)
        with original.repeat(len(PROMPT)) as copy, original.repeat(66) as part:
            original.feed([9])
            copy.feed([9])
            assert (copy.logits() == original.logits()).all()
            part.feed(PROMPT[66:])
            original.truncate(66)
            original.feed(PROMPT[66:])
            assert (part.logits() == original.logits()).all()


def test_a_longer_one_repeats_whole_pages_and_shares_none(artifact: Path) -> None:
    with llmc.load(artifact, threads=1, kv_tokens=1024) as model, model.sequence() as original:
        original.feed(PROMPT)
        free = model.info.kv_tokens_free
        with original.repeat(150) as long:
            assert long.length == 150
            assert free - model.info.kv_tokens_free == 192
            long.feed([5])
            assert np.isfinite(long.logits()).all()
        assert model.info.kv_tokens_free == free
        with pytest.raises(LlmcError, match="cannot be repeated to 193"):
            original.repeat(193)
        original.truncate(63)
        with pytest.raises(LlmcError, match="63 tokens cannot be repeated to 64"):
            original.repeat(64)


def test_a_cache_without_room_repeats_nothing(artifact: Path) -> None:
    with llmc.load(artifact, threads=1, kv_tokens=256) as model, model.sequence() as original:
        original.feed(PROMPT)
        with pytest.raises(LlmcError, match="no room for 192 more tokens"):
            original.repeat(192)
        assert model.info.kv_tokens_free == 128


@pytest.mark.parametrize(("batch", "context"), [(1, 3), (2, 5), (3, 12)])
def test_keys_are_repeated_to_any_length(batch: int, context: int) -> None:
    keys = torch.arange(2 * 5 * 3.0).reshape(1, 2, 5, 3)
    repeated = hf.repeat(keys, batch, context)
    assert repeated.shape == (batch, 2, context, 3)
    assert all(bool((repeated[:, :, i] == keys[:, :, i % 5]).all()) for i in range(context))


def test_an_artifact_is_measured_beside_hugging_face(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "files_folder", lambda: tmp_path)
    given = ["bench", str(artifact), "--batch", "1,2", "--lengths", "32,192,256", "--steps", "2", "--rounds", "1"]
    given += ["--prefill", "16", "--threads", "1", "--neighbours", "64", "--output", str(tmp_path / "record.json")]
    result = CliRunner().invoke(main, [*given, "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["panels"][0]["points"]
    assert {point["missing"] for point in points if point["length"] == 256} == {"context 192"}
    measured = [point for point in points if point["length"] < 256]
    assert len(measured) == 8
    assert all(point["tokens_per_s"]["median"] > 0 for point in measured), result.stderr
    assert all(point["times_hf"]["median"] > 0 for point in measured if point["system"] == "llmc")


def test_of_an_artifact_for_several_machines_what_runs_here_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    said = manifest() | {"target": {"name": "cuda:sm_90a"}}
    others = [{"target": {"name": "cuda:sm_90a"}}, {"target": {"name": "cpu:x86-64-v3"}, "batch": [7]}]
    two = {"plan.1": plan_section(), "manifest": said | {"targets": others}}
    found = subjects.manifest_of(write_stub(tmp_path / "two.so", **two))
    assert (found["target"]["name"], found["batch"]) == ("cpu:x86-64-v3", [7])
    found = subjects.manifest_of(write_stub(tmp_path / "one.so", manifest=said))
    assert found["target"]["name"] == "cuda:sm_90a"


@pytest.mark.parametrize(
    ("weights", "sources"),
    [("random", ["opt-125m-4k random 128,4096"]), ("real", ["opt-125m real 128", "opt-125m-4k random 4096"])],
)
def test_lengths_beyond_the_model_take_random_weights(
    weights: str, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "files_folder", lambda: tmp_path)
    monkeypatch.setattr(subjects, "compiled", lambda *arguments: tmp_path / "m.so")
    monkeypatch.setattr(subjects, "manifest_of", lambda path: MANIFEST)
    made = subjects.subjects("opt-125m", Request(lengths=(128, 4096), weights=weights), lambda *_: None)
    said = [f"{Path(m.source).name} {m.weights} {','.join(map(str, m.lengths))}" for m in made]
    assert said == sources
    assert {m.panel.title for m in made} == {"OPT-125M"}
    assert all("* beyond the model's own 2048 positions" in m.panel.notes[0] for m in made)
    config = json.loads((tmp_path / "configurations" / "opt-125m-4k" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096


@pytest.mark.parametrize("kind", ["f32", "bf16", "int8"])
def test_the_limits_of_the_machine_are_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEAK_S", 0.01)
    assert 1e8 < limits.reader()(1, 1 << 24) ** -1 * (1 << 24) < 1e13
    peak = limits.arithmetic_peak(1, kind)
    assert peak > 1e8 or (kind != "f32" and peak == 0)

"""`llmc verify`: damage is found, and a certificate is replayed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import llmc
from llmc.cli.main import main
from llmc.runtime import ArtifactFile, LlmcError
from tests.runtime.stub_artifact import manifest, write_stub

PROMPTS = ([1, 2, 3], [9] * 20)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the compiler would record of the stub, with a reference a hair away."""
    prompts = []
    with llmc.load(write_stub(tmp_path_factory.mktemp("stub") / "stub.so")) as model:
        for tokens in PROMPTS:
            logits = model.logits(tokens)[-1]
            top = [int(i) for i in (-logits).argsort()[:8]]
            greedy = model.tokens(tokens, 12, ignore_eos=True)
            values = [float(logits[i]) + 1e-4 for i in top]
            prompts.append({"tokens": tokens, "greedy": greedy, "top_logits": {"ids": top, "values": values}})
    return {"status": "passed", "prompts": prompts, "max_logit_error": 1.1e-4, "logit_range": 16.0}


def verify(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(path), *arguments])


def certified(path: Path, certificate: dict[str, Any]) -> Path:
    return write_stub(path, manifest=manifest() | {"certificate": certificate})


def spoilt(certificate: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = certificate["prompts"]
    return certificate | {"prompts": [first | changes, *others]}


def test_a_good_artifact_passes_every_check(tmp_path: Path, certificate: dict[str, Any]) -> None:
    path = certified(tmp_path / "a.so", certificate)
    result = verify(path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["passed"] * 6
    said = json.loads(verify(path, "--json").stdout)
    assert said["status"] == "passed"
    assert said["checks"][2] == {"name": "prompt 1", "status": "passed", "detail": "12 greedy tokens as when compiled"}


def test_without_a_certificate_the_hashes_are_checked_and_the_rest_is_skipped(tmp_path: Path) -> None:
    result = verify(write_stub(tmp_path / "a.so"))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "skipped  certificate: random weights"


def test_other_greedy_tokens_fail(tmp_path: Path, certificate: dict[str, Any]) -> None:
    greedy = [*certificate["prompts"][0]["greedy"][:-1], 0]
    path = certified(tmp_path / "a.so", spoilt(certificate, greedy=greedy))
    result = verify(path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: verification failed: prompt 1: greedy token 12 is ")
    assert json.loads(verify(path, "--json").stdout)["status"] == "failed"


def test_logits_further_away_than_recorded_fail(tmp_path: Path, certificate: dict[str, Any]) -> None:
    top = certificate["prompts"][0]["top_logits"]
    for wrong in (top["values"][0] + 0.01, float("nan")):
        changed = {"ids": top["ids"], "values": [wrong, *top["values"][1:]]}
        result = verify(certified(tmp_path / "a.so", spoilt(certificate, top_logits=changed)))
        assert result.exit_code == 1
        assert "largest logits of the reference" in result.stderr


def test_damaged_weights_fail_and_are_not_run(tmp_path: Path, certificate: dict[str, Any]) -> None:
    path = certified(tmp_path / "a.so", certificate)
    with ArtifactFile.open(path) as file:
        offset = file.sections["weights"].offset
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 1
    path.write_bytes(data)
    result = verify(path)
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["passed", "failed"]
    assert "section 'weights' is not what was written" in result.stderr


def test_a_truncated_artifact_is_refused(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so")
    path.write_bytes(path.read_bytes()[:-100])
    result = verify(path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "truncated" in result.stderr


def test_against_compares_with_the_source_in_the_artifacts_own_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load_source(model: str, **how: Any) -> SimpleNamespace:
        asked.update(how, model=model)
        merged = [SimpleNamespace(record={"name": "sql", "sha256": "1a"})]
        return SimpleNamespace(adapters=merged if model == "adapter" else [])

    def certify_source(artifact: Path, source: object, quant: str | None, scheme: object) -> dict[str, float]:
        if asked["model"] == "other":
            raise LlmcError("the compiled model does not match its source")
        return {"relative_error": 1e-6}

    fake(monkeypatch, "llmc.compiler.frontend", load_source=load_source)
    fake(monkeypatch, "llmc.compiler.certificate.certify", certify_source=certify_source, judged_as=lambda *_: None)
    path = write_stub(tmp_path / "a.so")
    assert "against same: logits within 1.0e-06" in verify(path, "--against", "same").stdout
    assert (asked["dtype"], asked["max_sequence"]) == ("f32", 48)
    result = verify(path, "--against", "other")
    assert result.exit_code == 1
    assert "against other: the compiled model does not match its source" in result.stderr
    result = verify(path, "--against", "adapter")
    assert (result.exit_code, "into the artifact: none; into the model: sql" in result.stderr) == (1, True)


def test_against_needs_a_machine_that_the_artifact_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    said = manifest() | {"target": {"name": "cuda:sm_90a", "cpu_features": []}}
    path = write_stub(tmp_path / "a.so", manifest=said)
    result = verify(path, "--against", "model")
    assert result.exit_code == 1
    hint = "compare it on a machine that it was compiled for"
    assert result.stderr == f"error: this machine lacks an NVIDIA GPU\n  at: {path}\n  hint: {hint}\n"


def test_against_without_the_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmc.compiler.certificate.certify", None)
    missing = ModuleNotFoundError("No module named 'torch'", name="torch")

    def load_source(*_: Any, **__: Any) -> None:
        raise missing

    fake(monkeypatch, "llmc.compiler.frontend", load_source=load_source)
    fake(monkeypatch, "llmc.compiler.certificate.certify", certify_source=None, judged_as=None)
    result = verify(write_stub(tmp_path / "a.so"), "--against", "model")
    assert result.exit_code == 1
    assert "the Python package torch, which is not installed" in result.stderr
    assert "pip install 'llmc[compiler]'" in result.stderr


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(vars(SimpleNamespace(**attributes)))
    monkeypatch.setitem(sys.modules, name, module)

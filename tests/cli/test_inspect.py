"""`llmc inspect`: every view, as text and as JSON, of a file whose code is never loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.cli.main import main
from llmc.cli.output import certificate_in_words, in_seconds
from llmc.cli.schedules_view import switches, weight_in_words, write
from llmc.compiler.kernel import Call, TensorType
from tests.runtime.stub_artifact import KERNELS, WEIGHTS, manifest, write_stub


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose code could not be loaded."""
    return write_stub(tmp_path_factory.mktemp("stub") / "stub.so", code=b"no code at all")


def inspect(artifact: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["inspect", str(artifact), *arguments])


def in_json(artifact: Path, *arguments: str) -> dict[str, Any]:
    result = inspect(artifact, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    said: dict[str, Any] = json.loads(result.stdout)
    return said


def test_the_summary_says_model_target_sizes_and_certificate(stub: Path) -> None:
    result = inspect(stub)
    assert result.exit_code == 0
    for fact in ("stub (llama), 2 layers, f32, random weights", "cpu:x86-64-v3 (avx2 fma)", "skipped: random weights"):
        assert fact in result.stdout
    said = in_json(stub)
    assert said["bytes"] == stub.stat().st_size
    assert {section["name"]: section["bytes"] for section in said["sections"]}["weights"] == len(WEIGHTS)
    assert said["plans"][0] == {"kind": "body", "rows": 1, "calls": 1}


def test_the_plan_shows_every_call_with_its_arguments(stub: Path) -> None:
    text = inspect(stub, "--plan").stdout
    assert "body of 8 rows: 1 calls" in text
    assert "tokens[0:32] weights[0:1024] arena[0:512]" in text
    said = in_json(stub, "--plan")
    assert [kernel["name"] for kernel in said["kernels"]] == list(KERNELS)
    assert said["plans"][2]["calls"] == [
        {
            "kernel": "linear_64x64",
            "op": "",
            "weight": "",
            "bytes": None,
            "operations": None,
            "grid": 4,
            "arguments": [
                {"space": "arena", "offset": 0, "bytes": 64},
                {"space": "weights", "offset": 0, "bytes": 1024},
                {"space": "logits", "offset": 0, "bytes": 256},
            ],
        }
    ]
    assert said["plans"][0]["bytes"] == 2 * 16896


def test_the_graph_view_counts_nodes_pass_by_pass(stub: Path) -> None:
    text = inspect(stub, "--graph").stdout
    assert text.splitlines()[:3] == [
        "pass       rewrites  nodes left",
        "export            0           9",
        "fuse_norm         2           5",
    ]
    assert in_json(stub, "--graph")["final"] in text


def test_the_schedules_view_names_the_rule_of_each_operator(stub: Path) -> None:
    assert "  Linear  " in inspect(stub, "--schedules").stdout
    assert in_json(stub, "--schedules")["schedules"] == manifest()["schedules"]


def test_the_manifest_is_printed_as_it_is(stub: Path) -> None:
    assert json.loads(inspect(stub, "--manifest").stdout) == manifest() == in_json(stub, "--manifest")


def test_an_artifact_without_graph_says_so(tmp_path: Path) -> None:
    result = inspect(write_stub(tmp_path / "a.so", graph=None), "--graph")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not keep its graph" in result.stderr


def test_a_manifest_that_says_little_is_still_shown(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", manifest={})
    for view in ([], ["--plan"], ["--schedules"], ["--manifest"]):
        assert inspect(path, *view).exit_code == 0


@pytest.mark.parametrize(
    ("manifest", "view"),
    [
        ({"certificate": "x"}, ()),
        ({"switched": -1}, ("--schedules",)),
        ({"schedules": [{"plan": "body", "m": 1, "bytes": None}, {"plan": "body", "m": 1, "bytes": 1}]}, ("--plan",)),
    ],
)
def test_a_manifest_that_makes_no_sense_is_one_clear_line(
    manifest: dict[str, Any], view: tuple[str, ...], tmp_path: Path
) -> None:
    result = inspect(write_stub(tmp_path / "a.so", manifest=manifest), *view)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the manifest lacks what inspect shows: ")


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", graph={"passes": [], "final": "a\x1b[2Jb\nc"}, manifest={"created": "\x9b1m"})
    assert inspect(path, "--graph").stdout.endswith("a\ufffd[2Jb\nc\n")
    assert all("\x9b" not in inspect(path, *view).stdout for view in ([], ["--manifest"]))


def test_two_views_at_once_are_wrong_usage(stub: Path) -> None:
    assert inspect(stub, "--plan", "--graph").exit_code == 2


def test_what_is_no_artifact_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_text("hello")
    result = inspect(tmp_path / "a.so")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this is not an artifact\n")


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        (TensorType((1, 64), "bf16", tiled=True), TensorType((128, 64), "bf16", constant=True), "bf16 [128, 64]"),
        (TensorType((1, 64), "f32"), TensorType((128, 64), "i4", constant=True, group=32), "i4g32 [128, 64]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["llmc.LinearResidual", "llmc.RMSNormLinear"])
def test_a_schedule_names_its_weight_however_the_rest_lies(
    op: str, x: TensorType, weight: TensorType, said: str
) -> None:
    y = TensorType((1, 128), "f32")
    others = (TensorType((64,), "bf16", constant=True),) if "Norm" in op else ()
    behind = (y,) if "Residual" in op else ()
    call = Call(op, (x, *others, weight, *behind), (y,))
    assert weight_in_words({"call": str(call)}) == said


def test_a_tuned_schedule_says_which_family_it_is_and_what_it_beat() -> None:
    """A record whose parameters are the other family's: the table of switches follows it."""
    y = TensorType((8, 128), "f32")
    call = Call("llmc.Linear", (TensorType((8, 64), "f32"), TensorType((128, 64), "bf16", constant=True)), (y,))
    measured = {"share": 0.9, "limit": "copy bandwidth", "rate": 1.0, "clean": 1.0, "time_us": 1.0, "heuristic_us": 2.0}
    measured |= {"beat": "GEMV, 132 blocks", "beat_ratio": 1.5}
    record = {"plan": "body", "m": 8, "op": "llmc.Linear", "call": str(call), "nodes": 1, "family": "flat GEMM"}
    record |= {"params": "128x16 tiles", "bytes": 1, "operations": 1, "measured": measured}
    said = {"schedules": [record], "switches": switches([record])}
    lines = write(said).splitlines()
    assert "flat GEMM, 128x16 tiles" in lines[1]
    assert "GEMV, 132 blocks: 1.50x; the rule's own: 2.00x" in lines[1]
    measured["in_place"] = "a model M=8 @128"
    assert "  tuned in place  a layer 90 % of copy bandwidth" in write(said).splitlines()[1]
    assert lines[-1].split() == ["bf16", "[128,", "64]", "-", "8", "-"]
    switched = write({**said, "switched": ["a_pass: on"]}).splitlines()
    assert switched[-2:] == ["passes that a measurement has turned on", "a_pass: on"]


def test_the_certificate_of_several_targets_says_on_which_it_was_made() -> None:
    certificate = {"status": "passed", "relative_error": 0.001, "target": "cpu:x86-64-v4"}
    assert certificate_in_words(certificate) == "passed: logits within 1.0e-03 of their range"
    said = certificate_in_words(certificate, several=True)
    assert said == "passed on cpu:x86-64-v4: logits within 1.0e-03 of their range"


def test_durations_carry_their_seconds() -> None:
    assert [in_seconds(s) for s in (0.003, 12.5, 119.7, 125)] == ["3 ms", "12.5 s", "2 min 0 s", "2 min 5 s"]

"""`llmc tune` around a stand-in for the tuner, and what `llmc inspect --schedules` makes of its records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.cli.main import main
from llmc.runtime import LlmcError
from tests.runtime.stub_artifact import manifest, write_stub

RECORD = {
    "op": "Linear",
    "n": 4096,
    "k": 11008,
    "m": 8,
    "weight": "bf16",
    "lanes": 16,
    "rule": "linear",
    "params": {"rows": 8, "panels": 2},
    "time_us": 2000.0,
    "share": 0.953,
    "limit": "read bandwidth",
    "rate": 34.6,
    "heuristic_us": 2200.0,
    "beat": "8x16 tiles, 1 a unit, 5504 steps at a time, 8/128 ahead",
    "beat_ratio": 1.07,
    "tried": 16,
    "clean": 0.9,
    "date": "2026-01-01",
    "machine": "a CPU, 2 threads",
    "llmc": "0.1.0",
}
REPORT = {
    "path": "tuned.json",
    "model": "m",
    "target": "cpu:x86-64-v4",
    "machine": "a CPU, 2 threads",
    "records": [RECORD, {**RECORD, "m": 1, "time_us": 2200.0, "share": 1.0, "clean": 0.1}],
    "kept": 3,
    "left": 0,
    "interrupted": False,
}
Tuner = Callable[..., dict[str, Any]]


def install(monkeypatch: pytest.MonkeyPatch, tuner: Tuner) -> None:
    module = ModuleType("llmc.compiler.tune")
    vars(module)["tune_model"] = tuner
    monkeypatch.setitem(sys.modules, "llmc.compiler.tune", module)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the tuner was asked for."""
    asked: dict[str, Any] = {}

    def tune_model(model: str, **options: Any) -> dict[str, Any]:
        asked.update(options, model=model)
        print("what a library has to say")
        for done, record in enumerate(REPORT["records"], 1):  # type: ignore[arg-type, var-annotated]
            options["progress"](done, 2, record)
        return REPORT

    install(monkeypatch, tune_model)
    return asked


def tune(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_options_reach_the_tuner(asked: dict[str, Any], tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--quant", "int4", "--quant-group", "32", "--batch", "1,16", "--budget", "90"]
    result = tune("m", "-o", tmp_path / "a.json", *options, "--threads", "2", "--target", "cpu:x86-64-v3", "--again")
    assert result.exit_code == 0
    del asked["progress"]
    assert asked == {
        "model": "m",
        "out": tmp_path / "a.json",
        "target": "cpu:x86-64-v3",
        "dtype": "bf16",
        "quant": "int4",
        "quant_group": 32,
        "quant_lm_head": None,
        "batch": (1, 16),
        "budget": 90.0,
        "threads": 2,
        "again": True,
    }


@pytest.mark.usefixtures("asked")
def test_each_call_is_a_line_beside_and_the_sum_a_line_on_standard_output() -> None:
    result = tune("m")
    assert result.stdout.splitlines() == [
        "tuned.json  m, cpu:x86-64-v4, a CPU, 2 threads",
        "2 tuned, 1 of them faster than the rule's own choice; 3 known before, 0 left",
    ]
    said = result.stderr
    assert "1/2  Linear bf16 [4096, 11008] M=8: 2000 us, 95 % of read bandwidth (35 GB/s), 1.10x faster" in said
    assert "2/2  Linear bf16 [4096, 11008] M=1: 2200 us, 100 %? of read bandwidth (35 GB/s), the rule's own" in said


@pytest.mark.usefixtures("asked")
def test_json_is_one_object() -> None:
    assert json.loads(tune("m", "--json").stdout) == REPORT


def test_an_interrupted_run_says_what_it_keeps_and_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda model, **options: {**REPORT, "left": 7, "interrupted": True})
    result = tune("m")
    assert result.exit_code == 130
    assert "7 left\n" in result.stdout
    assert "interrupted: what was measured is kept" in result.stdout


def test_a_loaded_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda model, **options: {**REPORT, "records": [{**RECORD, "clean": 0.2}]})
    assert "the machine was loaded" in tune("m").stdout


def test_a_refusal_is_fact_place_and_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **options: Any) -> dict[str, Any]:
        raise LlmcError("the file of tuned records is damaged", place="a.json", hint="remove it")

    install(monkeypatch, refuse)
    result = tune("m")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: the file of tuned records is damaged\n  at: a.json\n  hint: remove it\n"


@pytest.mark.parametrize("wrong", [["--budget", "0"], ["--batch", "x"], ["--dtype", "f8"], ["--threads", "-1"], []])
def test_wrong_usage_ends_with_2(wrong: list[str]) -> None:
    assert tune(*(["m", *wrong] if wrong else [])).exit_code == 2


# -- llmc inspect --schedules -----------------------------------------------------


def schedule(m: int, family: str, params: str, **changes: Any) -> dict[str, Any]:
    return {
        "plan": "body",
        "m": m,
        "op": "llmc.LinearResidual",
        "call": f"llmc.LinearResidual(f32[{m},512], bf16[256,512]!, f32[{m},256]) -> f32[{m},256]",
        "nodes": 2,
        "node": "layer.0.o",
        "rule": "linear",
        "params": params,
        "family": family,
        "measured": {},
        "layout": "bf16 [N/16][K/2][16][2]",
        "kernels": ["linear"],
        "bytes": 262_144,
        "operations": 262_144 * m,
    } | changes


SCHEDULES = [
    schedule(1, "GEMV", "1x64 tiles"),
    schedule(8, "flat GEMM", "8x32 tiles", measured=RECORD),
    schedule(32, "GEMM", "11x32 tiles", measured={**RECORD, "beat": "", "time_us": 2200.0, "clean": 0.0}),
    {k: v for k, v in schedule(1, "", "16 lanes", op="llmc.AddRMSNorm").items() if k not in ("family", "measured")},
]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_stub(tmp_path / "a.so", manifest={**manifest(), "schedules": SCHEDULES})


def test_linear_layers_say_schedule_share_and_what_it_beat(artifact: Path) -> None:
    lines = CliRunner().invoke(main, ["inspect", "--schedules", str(artifact)]).stdout.splitlines()
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        "body 1 LinearResidual bf16 [256, 512] 2 GEMV, 1x64 tiles heuristic 262.1 kB 0.000262 G",
        "body 8 LinearResidual bf16 [256, 512] 2 flat GEMM, 8x32 tiles tuned 95 % of read bandwidth (35 GB/s) "
        "8x16 tiles, 1 a unit, 5504 steps at a time, 8/128 ahead: 1.07x; the rule's own: 1.10x 262.1 kB 0.0021 G",
        "body 32 LinearResidual bf16 [256, 512] 2 GEMM, 11x32 tiles tuned 95 %? of read bandwidth (35 GB/s) "
        "262.1 kB 0.00839 G",
    ]


def test_the_switch_points_are_a_table_of_their_own(artifact: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", "--schedules", str(artifact)]).stdout
    assert [" ".join(line.split()) for line in text.split("\n\n")[1].splitlines()] == [
        "rows of x, by weight GEMV flat GEMM GEMM",
        "bf16 [256, 512] 1 8 32",
    ]
    said = json.loads(CliRunner().invoke(main, ["inspect", "--schedules", "--json", str(artifact)]).stdout)
    assert said["schedules"] == SCHEDULES
    assert said["switches"] == [{"weight": "bf16 [256, 512]", "rows": {"GEMV": [1], "flat GEMM": [8], "GEMM": [32]}}]


def test_other_operators_follow(artifact: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", "--schedules", str(artifact)]).stdout
    assert "  AddRMSNorm  " in text.split("\n\n")[2]

"""`llmc tune` for a GPU elsewhere: a folder to carry there, and what comes back."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.bench.gpu import prepare
from llmc.cli.main import main

SIGNATURE = {"op": "Linear", "n": 4096, "k": 4096, "m": 1, "weight": "bf16", "lanes": 8}


def tune(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def line(stage: str, item: str, **said: Any) -> str:
    return json.dumps({"stage": stage, "item": item, "event": "done", "at": 1.8e9, **said}) + "\n"


def tuned(item: str, us: float, own: bool, **said: Any) -> str:
    rest = {"params": {"warps": 8 if own else 4}, "words": item, "length": 0, "bytes": 33_554_432, "operations": 1}
    rest |= {"rule": "linear", "signature": SIGNATURE}
    return line("tune", item, us=us, own=own, **rest | said)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """What a run on a GPU left, cut off in the middle of a line."""
    path = tmp_path / "results.jsonl"
    path.write_text(
        line("facts", "device", name="NVIDIA H200", cuda="13.0")
        + line("facts", "machine", driver="580.159.04")
        + line("limits", "copy", gb_per_s=4194.304)
        + tuned("Linear #0", 12.5, True)
        + tuned("Linear #1", 10.0, False)
        + '{"stage": "tune", "item": "Linear #2", "ev'
    )
    return path


def test_what_was_found_elsewhere_is_kept(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "nvidia-h200.json"
    result = tune("--import", results, "--target", "cuda:sm_90a", "-o", out)
    assert result.stdout.splitlines() == [
        f"{out}  cuda:sm_90a, NVIDIA H200, driver 580.159.04, CUDA 13.0",
        "1 tuned, 1 of them faster than the rule's own choice; 0 known before",
    ]
    (record,) = json.loads(out.read_text())["records"]
    assert record["params"] == {"warps": 4}
    assert (record["time_us"], record["heuristic_us"], record["tried"]) == (10.0, 12.5, 2)
    assert (record["limit"], record["share"], record["rate"]) == ("copy bandwidth", 0.8, 4194.3)
    assert record["date"] == "2027-01-15"


def test_a_later_run_replaces_what_it_measured_again(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "nvidia-h200.json"
    tune("--import", results, "-o", out)
    other = {**SIGNATURE, "m": 8}
    results.write_text(results.read_text().replace(json.dumps(SIGNATURE), json.dumps(other)))
    assert "1 known before" in tune("--import", results, "-o", out).stdout
    assert len(json.loads(out.read_text())["records"]) == 2


def test_each_card_has_a_file_of_its_own(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "own"))
    other = tmp_path / "other.jsonl"
    other.write_text(results.read_text().replace("NVIDIA H200", "NVIDIA H100 80GB HBM3"))
    result = tune("--import", results, "--import", other)
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["nvidia-h100.json", "nvidia-h200.json"]
    refused = tune("--import", results, "--import", other, "-o", tmp_path / "both.json")
    assert "error: the results are of 2 cards: NVIDIA H100 80GB HBM3, NVIDIA H200" in refused.stderr
    assert not (tmp_path / "both.json").exists()


def test_what_two_drivers_measured_is_not_compared(results: Path, tmp_path: Path) -> None:
    """A resumed run under another driver: its time of one candidate alone makes no record."""
    later = line("facts", "device", name="NVIDIA H200", cuda="13.0") + line("facts", "machine", driver="590.1")
    whole = results.read_text().rpartition("\n")[0] + "\n"
    results.write_text(whole + later + line("limits", "copy", gb_per_s=4200.0) + tuned("Linear #1", 1.0, False))
    tune("--import", results, "-o", tmp_path / "a.json")
    (record,) = json.loads((tmp_path / "a.json").read_text())["records"]
    assert (record["time_us"], record["machine"]) == (10.0, "NVIDIA H200, driver 580.159.04, CUDA 13.0")


@pytest.mark.parametrize(("us", "kept"), [(12.4, 8), (12.2, 8), (12.1, 4)])
def test_the_rules_own_choice_stands_unless_another_is_clearly_faster(us: float, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("limits", "copy", gb_per_s=1e3) + tuned("a #0", 12.5, True) + tuned("a #1", us, False))
    tune("--import", path, "-o", tmp_path / "a.json")
    (record,) = json.loads((tmp_path / "a.json").read_text())["records"]
    assert record["params"] == {"warps": kept}
    assert record["heuristic_us"] == 12.5


def in_place(of: str, **said: Any) -> str:
    return line("in place", f"layer: {of}", of=of, chain="layer", us=1.0, **said)


HOSTILE = [
    in_place("nothing"),
    in_place("own", bytes=1, operations=1, calls=[3]),
    in_place("own", bytes=-1, operations=1, calls=[]),
    in_place("best", own_us=1.0, choice=[]),
    in_place("candidate", base_us=1.0, noise=0.0, signature=[]),
    line("in place", "layer: own", of=["own"]),
    "[" * 100_000,
    "[1]",
    '{"event": "done"}',
    tuned("Linear #1", float("nan"), False),
    tuned("Linear #1", -1.0, False),
    tuned("Linear #1", 1.0, False, signature={"op": 1}),
    tuned("Linear #1", 1.0, False, signature=[]),
    tuned("Linear #1", 1.0, False, params=3),
    tuned("Linear #1", 1.0, False, at=1e300),
    tuned("Linear #1", 1.0, False, length=None),
    line("limits", "copy", gb_per_s="fast"),
    "\ufffd\0{",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_that_say_nothing_usable_are_left_out_in_one_line(hostile: str, results: Path, tmp_path: Path) -> None:
    whole = results.read_text().rpartition("\n")[0] + "\n"
    results.write_text(hostile.strip() + "\n" + whole)
    result = tune("--import", results, "-o", tmp_path / "a.json")
    assert result.exit_code == 0
    assert result.stderr.startswith("lines that say nothing usable are left out (1): results.jsonl line 1: ")
    assert len(result.stderr.splitlines()) == 1
    (record,) = json.loads((tmp_path / "a.json").read_text())["records"]
    assert record["time_us"] == 10.0


def test_results_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("facts", "device", name="NVIDIA A100", capability=80) + tuned("a #0", 1.0, True))
    assert (
        "error: the results are of compute capability 8.0, which cuda:sm_90a is not for"
        in tune("--import", path).stderr
    )


def test_a_file_without_tuning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(line("facts", "device", name="NVIDIA H200"))
    result = tune("--import", path, "--target", "cuda:sm_90a")
    assert result.exit_code == 1
    assert "error: the file has no tuning in it" in result.stderr


def test_a_folder_is_made_for_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def write_kit(out: Path, target: Any, models: Any, **options: Any) -> dict[str, Any]:
        asked.append((out, str(target), models, options))
        return {"path": str(out), "jobs": 7, "candidates": 70, "kernels": 80, "bytes": 9_000_000}

    monkeypatch.setattr(prepare, "prepare", write_kit)
    options = ["--target", "cuda:sm_90a", "--quant", "int4", "--quant-group", "32", "--batch", "1,16"]
    result = tune("m", "--emit", tmp_path / "kit", *options)
    assert result.stdout.splitlines()[0] == f"{tmp_path / 'kit'}  7 calls, 70 candidates, 9.0 MB"
    wanted = prepare.Wanted("m", "int4", 32, None, max_sequence=None, batch=(1, 16))
    assert asked == [(tmp_path / "kit", "cuda:sm_90a", [wanted], {"most": 16, "carried": False, "odd": "none"})]


def test_a_folder_for_a_cpu_is_refused(tmp_path: Path) -> None:
    result = tune("m", "--emit", tmp_path / "kit")
    assert "error: a folder to measure with elsewhere is made for GPUs alone" in result.stderr


def test_a_machine_without_a_gpu_is_told_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")
    result = tune("a model", "--target", "cuda:sm_90a")
    assert result.exit_code == 1
    assert "error: this machine lacks an NVIDIA GPU\n  at: --target cuda:sm_90a\n  hint: --emit DIR" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "cuda:sm_90a,cpu"], "one at a time"),
        (["--target", "cuda:sm_90a", "--dtype", "f32"], "products of bf16 are tuned"),
    ],
)
def test_what_is_not_tuned_is_refused(options: list[str], said: str) -> None:
    result = tune("a model", *options)
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "prepare", full)
    result = tune("a model", "--target", "cuda:sm_90a", "--emit", tmp_path / "kit")
    assert result.exit_code == 1
    assert result.stderr == f"error: the folder cannot be written: No space left on device\n  at: {tmp_path / 'kit'}\n"


def test_a_folder_with_another_llmc_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "llmc" / "mine.py"
    mine.parent.mkdir()
    mine.touch()
    result = tune("a model", "--target", "cuda:sm_90a", "--emit", tmp_path)
    assert result.exit_code == 1
    assert f"error: the folder has an llmc that is no kit's\n  at: {tmp_path}" in result.stderr
    assert mine.exists()

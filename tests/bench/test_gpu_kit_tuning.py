"""What a kit's run tunes, and what becomes of it at home."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmc.bench.gpu import prepare
from llmc.bench.gpu.chains import add_chains
from llmc.bench.gpu.jobs import Jobs, add_model
from llmc.bench.gpu.prepare import Wanted
from llmc.cli import tune_gpu
from llmc.cli.main import main
from llmc.compiler.kernel import Call
from llmc.compiler.plan import Program
from llmc.compiler.tune import import_tuning
from llmc.schedules import records
from tests.bench.fake_gpu import TARGET, TINY, TUNED, Made, misuse, outcomes, run
from tests.runtime.toy_cuda import FAKE_DRIVER


def test_what_was_tuned_comes_home_and_is_used(
    model: Wanted, model_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = run(model_kit, tmp_path / "out", "--stages", "aef")
    assert set(outcomes(journal, "tune").values()) == {"done"}
    assert {item.partition(" #")[0].partition(" @")[0] for item in journal.results("tune")} == set(TUNED)
    assert misuse(tmp_path / "fake.log") == []

    slow = [entry for entry in journal.results("tune").values() if entry["own"]]
    for entry in slow:  # the fake driver's clock knows no kernel from another
        rest = {key: value for key, value in entry.items() if key not in ("stage", "item", "event", "at", "us")}
        journal.append("tune", entry["item"], "done", us=2 * entry["us"], **rest)
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    (report,) = import_tuning(journal.path)
    assert report["path"] == str(tmp_path / "tuned" / "fake-gpu-0.json")
    assert report["machine"] == "Fake GPU 0, CUDA 13.0"
    assert len(report["records"]) == len(TUNED)

    planned = prepare.plan_model(model, TARGET)
    measured = {
        str(records.signature(choice.call, TARGET)): choice.implementation
        for choice in planned.program.choices
        if choice.implementation.measured
    }
    assert set(measured) == set(TUNED)
    faster = [m for each in measured.values() if (m := each.measured)["time_us"] < m["heuristic_us"]]
    assert len(faster) == len(TUNED)


def test_a_machine_with_both_tunes_at_once(
    model: Wanted, model_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llmc tune MODEL --target cuda: a kit, its run, and the records, on this machine."""
    Made(monkeypatch)
    first = TUNED[0]
    kept, chained = add_model, add_chains

    def few(jobs: Jobs, calls: Iterable[Call], most: int) -> None:
        kept(jobs, [call for call in calls if str(records.signature(call, TARGET)) == first], most)

    def own(jobs: Jobs, model: str, program: Program, most: int, wanted: Iterable[Sequence[int]]) -> Any:
        return chained(jobs, model, program, 1, wanted)

    monkeypatch.setattr(prepare, "add_model", few)
    monkeypatch.setattr(prepare, "add_chains", own)
    monkeypatch.setattr(prepare, "micro_kernels", dict)
    monkeypatch.setattr(prepare, "SETTINGS", {**prepare.SETTINGS, **TINY})
    monkeypatch.setattr(tune_gpu, "MOST", 2)
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setenv("LLMC_CUDA_DRIVER", str(model_kit / FAKE_DRIVER))
    monkeypatch.setenv("LLMC_FAKE_CUDA_KERNELS", str(model_kit / "kernels.so"))
    answer = CliRunner().invoke(main, ["tune", model.model, "--target", str(TARGET), "--batch", "1", "--json"])
    assert answer.exit_code == 0, answer.stderr
    (report,) = json.loads(answer.stdout)["cards"]
    assert (report["path"], report["left_out"]) == (str(tmp_path / "tuned" / "fake-gpu-0.json"), [])
    (record,) = report["records"]
    assert f"{record['op']} {record['weight']} [{record['n']}, {record['k']}] M={record['m']}" == first
    assert (record["tried"], record["in_place"]) == (2, "tiny M=1 @40")


def test_candidates_are_measured_in_their_places(model_kit: Path, tmp_path: Path) -> None:
    """A model's layer, between its attentions, on the driver whose clock knows no kernel from another."""
    journal = run(model_kit, tmp_path / "out", "--stages", "ai")
    chain = "tiny M=1 @40"
    first, attention, _ = TUNED
    tried = [f"{chain}: {what} #1" for what in ("together", first, attention)]
    assert outcomes(journal, "in place") == dict.fromkeys([f"{chain}: own", *tried, f"{chain}: best"], "done")
    found = journal.results("in place")
    assert found[f"{chain}: own"]["us"] == found[f"{chain}: best"]["own_us"] > 0
    assert len({found[item]["base_us"] for item in tried}) == 1
    assert f"| {chain} | {found[f'{chain}: own']['us']:.1f} |" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []

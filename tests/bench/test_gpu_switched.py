"""A pass that is off: a kit's run measures whole models with it and without it, and what comes home turns it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.bench.gpu import prepare, switched
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.prepare import Wanted
from llmc.compiler.tune import import_tuning
from llmc.schedules import records
from llmc.schedules.switches import APPEND_IN_PRODUCT, DEFER_NORM_IN_PROMPTS
from tests.bench.fake_gpu import TARGET, misuse, outcomes, run

PAIR, OTHER = f"tiny {APPEND_IN_PRODUCT}", f"tiny {DEFER_NORM_IN_PROMPTS}"
ITEMS = [f"{pair} {task}" for pair in (PAIR, OTHER) for task in ("logits", "prompt 100")]


def test_a_run_measures_it_and_what_comes_home_turns_it_on(
    model: Wanted, model_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the driver that stands in for a GPU's, whose times are another thing's: they are written over."""
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    journal = run(model_kit, tmp_path / "out", "--stages", "aj", LLMC_GPU_WORK=str(tmp_path))
    assert outcomes(journal, "switches") == dict.fromkeys(ITEMS, "done")
    found = journal.results("switches")
    assert found[f"{PAIR} logits"]["error"] == 0 < found[f"{OTHER} logits"]["error"]
    prompt = found[f"{PAIR} prompt 100"]
    assert (prompt["rows"], len(prompt["with_s"]), len(prompt["without_s"])) == (128, 2, 2)
    assert f"- {PAIR} prompt 100: {prompt['ratio']:.3f} times as long" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []

    assert turned_on(journal, prompt, [0.998, 0.999]) is False
    assert "RotaryAppend" not in operators(model)
    assert turned_on(journal, prompt, [0.97, 0.99]) is True
    assert "RotaryAppend" in operators(model)
    again = prepare.plan_model(Wanted(model.model, max_sequence=None, batch=(1,), switch=APPEND_IN_PRODUCT), TARGET)
    assert APPEND_IN_PRODUCT not in [each.name for each in again.tuned.on(TARGET)]  # to compare with


def turned_on(journal: Journal, prompt: dict[str, Any], times: list[float]) -> bool:
    rest = {name: value for name, value in prompt.items() if name not in ("stage", "item", "event", "at")}
    journal.append("switches", prompt["item"], "done", **{**rest, "with_s": times, "without_s": [1.0, 1.0]})
    (report,) = import_tuning(journal.path)
    (said,) = [line for line in report["switches"] if line.startswith(f"{APPEND_IN_PRODUCT}: ")]
    return ": on for 128 – 128 rows" in str(said)


def operators(model: Wanted) -> str:
    return " ".join(choice.call.op for choice in prepare.plan_model(model, TARGET).program.choices)


class Told:
    """A model that says what it is told to."""

    def __init__(self, *logits: float) -> None:
        self.logits = logits

    def behind(self, n: int, n_new: int) -> Any:
        return np.array(self.logits), [0] * n_new


def test_logits_that_differ_end_it(model_kit: Path, tmp_path: Path) -> None:
    a, b = Told(0.0, 1.0, 2.0), Told(0.0, 1.0, 2.01)
    found = switched.compared(a, b, [5], True)  # type: ignore[arg-type]
    assert (found["same_tokens"], found["of"]) == (1, 1)
    assert 0 < found["error"] < switched.MOST_ERROR
    for other in (Told(0.0, 1.0, 2.2), Told(0.0, 1.0, float("nan"))):
        with pytest.raises(ValueError, match="logits differ by"):
            switched.compared(a, other, [5], True)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="logits differ by"):
            switched.compared(a, other, [5], False)  # type: ignore[arg-type]
    few = Told(*np.arange(100.0)), Told(3.0, *np.arange(1.0, 100.0))
    assert switched.compared(*few, [5], False)["mean"] < 0.02 < 0.1 < switched.compared(*few, [5], False)["error"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits differ by"):
        switched.compared(*few, [5], True)  # type: ignore[arg-type]
    kit, journal = Kit(model_kit / "kit"), Journal(tmp_path / "results.jsonl")
    journal.append("switches", f"{PAIR} logits", "failed", error="logits differ")
    with pytest.raises(RuntimeError, match="their logits differ"):
        switched.refuse_unequal(journal, PAIR)
    assert list(switched.items(kit)) == ITEMS


def test_lines_that_say_nothing_usable_turn_nothing_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    journal.append("facts", "device", "done", name="Fake GPU 0", capability=90)
    line: dict[str, Any] = {"pass": APPEND_IN_PRODUCT, "model": "m", "rows": 128, "ratio": 0.9}
    line |= {"with_s": [0.9], "without_s": [1.0]}
    changes: list[dict[str, Any]] = [{"with_s": []}, {"with_s": [0.0]}, {"rows": "many"}, {"without_s": None}]
    for item, change in enumerate(changes):
        journal.append("switches", f"m {item}", "done", **{**line, **change})
    journal.append("switches", "m right", "done", **line)
    (report,) = import_tuning(journal.path, out=tmp_path / "gpu.json")
    assert len(report["left_out"]) == 4
    found = records.load_switches(tmp_path / "gpu.json", TARGET)
    assert [(each.fewest, each.ratio, each.pairs, each.is_on) for each in found.values()] == [(128, 0.9, 1, True)]

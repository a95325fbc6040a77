"""What a kit's run does when, how long that takes, and what is remembered of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmc.bench.gpu import facts, plan
from llmc.bench.gpu.clock import Clock
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.run import LETTERS
from llmc.bench.gpu.stages import STAGES
from llmc.bench.gpu.summary import failures


def test_what_another_card_or_driver_said_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    for name, driver, kept in (("one", 1, 0), ("one", 1, 1), ("one", 2, 0), ("other", 2, 0)):
        journal.append("facts", "device", "done", name=name)
        journal.append("facts", "machine", "done", driver=driver)
        assert len(journal.results("check")) == kept
        journal.append("check", "kernel", "done")


def test_what_does_not_fit_into_the_time_is_left_out_for_what_does(tmp_path: Path) -> None:
    """How long an item takes is seen by the last ones of its kind; paper says it before there is one."""
    journal = Journal(tmp_path / "results.jsonl")
    paper = Clock(journal).expected("whole", "m hf-compile decode 1x128")
    assert paper > 10 * Clock(journal).expected("whole", "m llmc decode 1x128")
    journal.append("whole", "m hf-compile decode 1x128", "done", took_s=2 * paper)
    journal.append("whole", "m llmc decode 8x128", "done", took_s=0.01)
    clock = Clock(journal)
    assert clock.expected("whole", "other hf-compile decode 8x128") > 2 * paper
    assert 0.01 < clock.expected("whole", "m llmc decode 1x128") < 1.0


def test_the_plan_is_the_one_that_the_page_shows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    shown = page.partition("<!-- plan -->\n")[2].partition("\n<!-- end plan -->")[0]
    assert shown == "\n".join(plan.table())


def test_every_part_comes_in_either_visit_and_its_paper_fits_its_share() -> None:
    first, second = (plan.parts_of(visit) for visit in (1, 2))
    assert {part.name for part in first} == {part.name for part in second}
    assert all(part.seconds <= part.most for part in first)
    assert sum(part.seconds for part in plan.VISITS[1]) < plan.SECONDS[1]
    assert [part.name for part in plan.named("facts+tune")] == ["facts", "tune"]
    assert "".join(stage.letter for stage in STAGES) == LETTERS


def test_one_reason_why_several_items_failed_is_said_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    for item, error in (("one", "no tool"), ("two", "no tool"), ("three", "another"), ("four", "no tool")):
        journal.append("sanitize", item, "failed", error=error)
    assert list(failures(journal)) == ["- sanitize one and 2 more: no tool", "- sanitize three: another"]


def test_a_tool_is_known_by_its_version_or_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, body in {"good": "echo a tool; echo Version 1.2", "silent": "true", "bad": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    found = [facts.tool(name) for name in ("good", "silent", "bad", "there-is-none")]
    assert found == ["Version 1.2", str(tmp_path / "silent"), str(tmp_path / "bad"), None]

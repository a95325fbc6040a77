"""How long what hangs, or takes long, keeps the rest waiting, and what is left out behind it."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.gpu import measure, plan, stages, watch, work
from llmc.bench.gpu.journal import Journal
from tests.bench.test_gpu_in_place import ATTENTION, CHAIN, PRODUCT, PRODUCT_ITEM, job, kit_of


@pytest.mark.parametrize(
    "hung",
    [("check", f"{PRODUCT_ITEM} #1"), ("tune", f"{PRODUCT_ITEM} #1"), ("in place", f"{CHAIN}: {PRODUCT_ITEM} #1")],
)
def test_what_does_a_call_as_one_that_hung_did_is_not_tried(hung: tuple[str, str], tmp_path: Path) -> None:
    """It could take as long again before it is ended.  The rules' own choices are tried."""
    journal = Journal(tmp_path / "results.jsonl")
    product = job(PRODUCT, "multiply", "multiply_b", "multiply_c1", "multiply_d", "multiply_c2")
    product["candidates"][1]["words"] = "multiply_c"
    kit = kit_of(tmp_path / "kit", job(ATTENTION, "attend", "attend_b", "attend_small", "attend_c"), product)

    def left(part: plan.Part, of: str = PRODUCT_ITEM) -> list[int]:
        return [int(item[-1]) for item in work.waiting(part, kit, journal) if f"{of} #" in item]

    journal.append(*hung, "failed", error="wrong")
    assert 4 in left(plan.TUNING)
    assert 4 in left(plan.IN_PLACE)
    journal.append(*hung, "failed", error=f"{work.TOO_LONG}, or was stopped")
    assert [left(plan.TUNING), left(plan.IN_PLACE)] == [[0, 3], [3]]
    assert left(plan.IN_PLACE, "together") == [3]
    journal.append("in place", f"{CHAIN}: together #3", "failed", error=f"{work.TOO_LONG}, or was stopped")
    journal.append("in place", "another: together #2", "failed", error=f"{work.TOO_LONG}, or was stopped")
    assert [left(plan.IN_PLACE), left(plan.IN_PLACE, "together")] == [[3], []]


def test_an_item_is_waited_for_as_long_as_its_own_stage_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as those of others that the same process does: here a kernel hangs behind a long product."""
    journal = Journal(tmp_path / "results.jsonl")
    short = [replace(stage, longest=60.0 if stage.letter == "e" else 0.2) for stage in stages.STAGES]
    monkeypatch.setattr(stages, "STAGES", short)
    line = """echo '{"stage": "%s", "item": "an item", "event": "begin"}' >> """ + str(journal.path)
    process = subprocess.Popen(
        ["sh", "-c", f"{line % 'limits'}; sleep 0.6; {line % 'check'}; sleep 60"], start_new_session=True
    )
    began = time.time()
    assert watch.watch(process, journal, began + 60) == -9
    assert time.time() - began < 30
    assert journal.last()["stage"] == "check"


def test_a_part_has_its_time_once_however_often_its_process_ends(tmp_path: Path) -> None:
    """Else each kernel that ends a process would give the parts in front of it their whole time again."""
    kit, journal = kit_of(tmp_path / "kit", job(ATTENTION, "attend"), job(PRODUCT, "multiply")), Journal(tmp_path / "r")
    part, now = replace(plan.TUNING, most=100), time.time()
    line = {"stage": measure.STAGE, "item": "another", "event": "begin", "part": part.name, "at": now - 200}
    journal.path.write_text(json.dumps(line) + "\n")

    def done(since: float) -> list[str]:
        ran: list[str] = []

        def run(item: str) -> dict[str, Any]:
            ran.append(item)
            return {}

        status = work.do([part], lambda stage: run, kit, journal, now + 60, since)
        assert status == (work.DONE if ran else work.OUT_OF_TIME)
        return ran

    assert done(since=now - 300) == []
    assert done(since=now - 100) == list(measure.items(kit))  # what another run began does not count

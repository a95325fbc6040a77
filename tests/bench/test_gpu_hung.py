"""What the tuner leaves out behind a candidate that hung."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.bench.gpu import plan, work
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

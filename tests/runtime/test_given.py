"""Rows of numbers that stand for tokens, and towers that make them."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.plan import unpack_plan
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_given
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_given import TILE, TILE_ROWS, TOWER, GivenPlan

HEADER = fmt.PLAN_HEADER.size
HUGE = (2**32 - 1).to_bytes(4, "little")


@pytest.fixture(scope="module")
def given_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_given.build_artifact(tmp_path_factory.mktemp("given"), GivenPlan())


def test_a_text_without_rows_is_that_of_a_model_without_any(given_so: Path) -> None:
    with llmc.load(given_so) as model:
        assert model.logits(TEXT).tolist() == toy.oracle(TEXT)


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_artifact_with_rows_says_so_in_its_version() -> None:
    plan = GivenPlan().pack()
    assert plan[4] == fmt.FORMAT_GIVEN
    tables = unpack_plan(plan, len(toy.weights_section()), "x")
    assert (tables.header.n_row, tables.header.tile) == (toy.CHANNELS, TILE)
    assert tables.plans[-1][:2] == (TOWER, TILE_ROWS)
    more = tables.header._replace(slot_bytes=64, default_slots=3, adapters=("sql", "chat"))
    assert fmt.unpack_plan_header(fmt.pack_plan_header(more)) == more
    assert fmt.pack_plan_header(more._replace(n_row=0))[4] == fmt.FORMAT_ADAPTERS


@pytest.mark.parametrize("n_bytes", [HEADER, HEADER + 16, HEADER + 31])
def test_a_header_that_is_cut_off_is_refused(given_so: Path, tmp_path: Path, n_bytes: int) -> None:
    refuse(given_so, tmp_path, GivenPlan().pack()[:n_bytes])


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (0, b"\1"),  # states that are not aligned
        (0, b"\x40"),  # states, and no slots
        (12, b"\1\0\0\0"),  # an adapter, whose name is where the tables begin
        (12, HUGE),
        (16, bytes(4)),  # rows of nothing
        (16, (fmt.MAX_ROW + 1).to_bytes(4, "little")),
        (16, HUGE),
        (20, bytes(4)),  # a tile without channels
        (20, bytes(12)),  # a tower, and no tile
        (20, HUGE),
        (20, HUGE * 3),
        (28, (fmt.MAX_TILE // 6 + 1).to_bytes(4, "little")),
    ],
)
def test_hostile_numbers_are_refused(given_so: Path, tmp_path: Path, place: int, data: bytes) -> None:
    plan = bytearray(GivenPlan().pack())
    plan[HEADER + place : HEADER + place + len(data)] = data
    refuse(given_so, tmp_path, bytes(plan))


@pytest.mark.parametrize("space", ["given", "is_given", "pixels", "made"])
@pytest.mark.parametrize(
    "change", [(1 << 16, 64), (0, 2**40), (2**64 - 64, 128), (0, 4 * 24 + 4 * 3 * toy.CHANNELS + 4)]
)
def test_arguments_outside_of_rows_and_pixels_are_refused(
    given_so: Path, tmp_path: Path, space: str, change: tuple[int, int]
) -> None:
    plan = GivenPlan()
    at = next(i for i, (name, _, _) in enumerate(plan.arguments) if name == space)
    plan.arguments[at] = (space, *change)
    refuse(given_so, tmp_path, plan.pack())


@pytest.mark.parametrize("space", ["tokens", "positions", "page_table", "kv", "rows", "logits", "given", "is_given"])
def test_a_tower_sees_no_sequences(given_so: Path, tmp_path: Path, space: str) -> None:
    plan = GivenPlan()
    plan.arguments[-1] = (space, 0, 4)
    refuse(given_so, tmp_path, plan.pack())


@pytest.mark.parametrize("space", ["pixels", "made"])
def test_a_step_sees_no_pixels(given_so: Path, tmp_path: Path, space: str) -> None:
    plan = GivenPlan()
    plan.arguments[0] = (space, 0, 4)
    refuse(given_so, tmp_path, plan.pack())


def test_a_plan_without_rows_may_not_name_any(given_so: Path, tmp_path: Path) -> None:
    refuse(given_so, tmp_path, GivenPlan((0, 0, 0)).pack(n_row=0))


def test_there_is_a_tower_where_there_are_tiles_and_one_at_most(given_so: Path, tmp_path: Path) -> None:
    refuse(given_so, tmp_path, GivenPlan().pack(tile=(0, 0, 0)))
    refuse(given_so, tmp_path, GivenPlan((0, 0, 0)).pack(tile=TILE))
    plan = GivenPlan()
    kind, n_rows, first, n_calls = plan.plans[-1]
    plan.plans.append((kind, n_rows + 1, first, n_calls))
    refuse(given_so, tmp_path, plan.pack())


def refuse(path: Path, folder: Path, plan: bytes) -> None:
    """By the runtime, and by what reads a plan in Python."""
    code = (path.parent / "code.so").read_bytes()
    (folder / "spoiled.so").write_bytes(toy.pack_sections(toy.toy_sections(code, plan=plan)))
    with pytest.raises(LlmcError, match=r"plan|call \d+ of|towers"):
        llmc.load(folder / "spoiled.so")
    with pytest.raises(LlmcError, match="the plan section is not valid"):
        unpack_plan(plan, len(toy.weights_section()), "x")

"""Rows of numbers that stand for tokens, and towers that make them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.plan import unpack_plan
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_given
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_saved_damage import hashed
from tests.runtime.toy_given import TILE, TILE_ROWS, TOWER, Floats, GivenPlan

HEADER = fmt.PLAN_HEADER.size
HUGE = (2**32 - 1).to_bytes(4, "little")


@pytest.fixture(scope="module")
def given_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_given.build_artifact(tmp_path_factory.mktemp("given"), GivenPlan())


@pytest.fixture
def model(given_so: Path) -> Iterator[Model]:
    with llmc.load(given_so) as model:
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens
        assert model.info.n_rows == 0


def some(n: int, seed: int = 0) -> Floats:
    """Rows of whole numbers, as the toy's embeddings are."""
    return np.random.default_rng(seed).integers(0, toy.PRIME, (n, toy.CHANNELS)).astype(np.float32)


def mixed(rows: Floats, ids: range) -> tuple[list[int], list[int | Floats]]:
    """A text in which some tokens are rows, as it is fed and as the oracle takes it."""
    fed, wanted = list[int](TEXT[:20]), list[int | Floats](TEXT[:20])
    for place, row in zip((0, 3, 4, 11, 19), (0, 2, 1, 3, 2), strict=True):
        fed[place], wanted[place] = ids[row], rows[row]
    return fed, wanted


def test_a_text_without_rows_is_that_of_a_model_without_any(model: Model) -> None:
    assert model.logits(TEXT).tolist() == toy.oracle(TEXT)
    assert (model.info.n_row, model.info.tile, model.info.n_tile_rows) == (toy.CHANNELS, TILE, TILE_ROWS)


def test_a_row_stands_for_a_token_in_any_chunks_and_company(model: Model) -> None:
    rows = some(4)
    with model.rows(rows) as given, model.rows(some(2, seed=1)) as more:
        assert [*given.ids, *more.ids] == [*range(toy.VOCAB, toy.VOCAB + 6)]
        assert (given.numbers() == rows).all()
        assert model.info.n_rows == 6
        fed, wanted = mixed(rows, given.ids)
        logits = toy_given.oracle(wanted)
        assert model.logits(fed).tolist() == logits
        with model.sequence() as one, model.sequence() as other:
            for start, stop in ((0, 1), (1, 5), (5, 20)):
                model.step([(one, fed[start:stop]), (other, TEXT[: stop - start])])
                with one.fork() as fork:
                    fork.feed([more.ids[1]])
                    row = more.numbers()[1]
                    assert fork.logits().tolist() == toy_given.oracle([*wanted[:stop], row])[-1]
            assert one.logits().tolist() == logits[-1]
            assert one.tokens == fed
            one.truncate(4)
            one.feed(fed[4:20])
            assert one.logits().tolist() == logits[-1]


def test_a_text_goes_on_from_rows(model: Model) -> None:
    rows = some(4)
    with model.rows(rows) as given:
        fed, wanted = mixed(rows, given.ids)
        said = model.tokens(fed, 6, ignore_eos=True)
        for n, token in enumerate(said):
            assert token == int(np.argmax(toy_given.oracle([*wanted, *said[:n]])[-1]))
        assert model.tokens(fed, 6, ignore_eos=True, speculate=4) == said
        model.tokens(fed, 3, repetition_penalty=1.5, frequency_penalty=1)
        assert model.token_bytes(given.ids[0]) == b""


def test_rows_that_are_given_back_are_read_no_more_and_their_numbers_are_not_used_again(model: Model) -> None:
    first, second, third = model.rows(some(3)), model.rows(some(1)), model.rows(some(2))
    with model.sequence() as sequence:
        sequence.feed([1, *second.ids])
        second.close()
        sequence.feed([2])
        assert sequence.logits().tolist() == toy_given.oracle([1, some(1)[0], 2])[-1]
        for wrong in (toy.VOCAB + 3, first.model.info.n_ids + 6, 2**31 - 1):
            fact = "stands for a row that was given back" if wrong == toy.VOCAB + 3 else "out of range"
            with pytest.raises(LlmcError, match=f"token {wrong} .*{fact}"):
                sequence.feed([3, wrong])
        assert sequence.length == 3
        sequence.feed([*first.ids, *third.ids])
    assert (third.numbers() == some(2)).all()
    first.close()
    first.close()
    with model.rows(some(1)) as fourth:
        assert fourth.ids.start == toy.VOCAB + 6
        with model.running() as (api, handle), pytest.raises(LlmcError, match="no rows are kept from 66 on"):
            model.check(api.rows_free(handle, third.ids.start + 1))
    third.close()


def test_a_sequence_with_rows_is_not_saved(model: Model, tmp_path: Path) -> None:
    with model.rows(some(1)) as given, model.sequence() as sequence:
        sequence.feed([1, 2, *given.ids, 3])
        fact = "token 2 of the sequence is a row of a picture, or the caller's own, which no file keeps"
        with pytest.raises(LlmcError, match=fact):
            sequence.save(tmp_path / "text.seq")
        sequence.truncate(2)
        sequence.save(tmp_path / "text.seq")
    data = bytearray((tmp_path / "text.seq").read_bytes())
    data[fmt.SAVED.size + 4 : fmt.SAVED.size + 8] = toy.VOCAB.to_bytes(4, "little")
    (tmp_path / "text.seq").write_bytes(hashed(bytes(data)))
    with model.rows(some(9)), pytest.raises(LlmcError, match=f"its token 1 is {toy.VOCAB}, and the vocabulary has"):
        model.restore(tmp_path / "text.seq")


def test_many_rows_are_kept_and_found(model: Model) -> None:
    kept = [model.rows(some(1 + n % 3, seed=n)) for n in range(50)]
    for n in (0, 7, 49, 20):
        kept[n].close()
    alive = [(n, given) for n, given in enumerate(kept) if n not in (0, 7, 49, 20)]
    assert model.info.n_rows == sum(len(given.ids) for _, given in alive)
    for n, given in alive:
        assert (given.numbers() == some(1 + n % 3, seed=n)).all()
        assert model.logits(given.ids[-1:]).tolist() == toy_given.oracle([some(1 + n % 3, seed=n)[-1]])
        given.close()


def test_a_tile_becomes_rows(model: Model) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, TILE).astype(np.float32)
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        with model.image(pixels) as given, model.image(pixels + 1) as other:
            assert (given.numbers() == toy_given.tower(pixels)).all()
            assert (other.numbers() == toy_given.tower(pixels + 1)).all()
            assert [*given.ids, *other.ids] == [*range(toy.VOCAB, toy.VOCAB + 6)]
            assert sequence.logits().tolist() == toy.oracle(TEXT[:5])[-1], "a tower leaves the logits of others alone"
            sequence.feed([*given.ids, 4])
            assert sequence.logits().tolist() == toy_given.oracle([*TEXT[:5], *given.numbers(), 4])[-1]


def test_a_profile_has_what_a_tile_costs(model: Model) -> None:
    with model.profile() as profile, model.image(np.zeros(TILE, np.float32)) as given:
        model.logits([1, *given.ids])
    picture, prefill = profile.steps
    assert (picture.phase, picture.inputs, picture.n_tokens) == ("picture", ((0, TILE_ROWS),), TILE_ROWS)
    kernels = GivenPlan().kernels
    tower = {first: kernels[kernel][0] for first, (kernel, *_) in enumerate(GivenPlan().calls)}
    assert {tower[int(call)] for call in picture.events["call"]} == {"look", "made"}
    assert prefill.phase == "prefill"
    assert not {tower[int(call)] for call in prefill.events["call"]} & {"look", "made"}


def test_a_tower_that_fails_is_told_and_leaves_no_rows(model: Model) -> None:
    with pytest.raises(LlmcError, match=r"look.* failed"):
        model.image(np.full(TILE, -1, np.float32))
    assert model.info.n_rows == 0
    with pytest.raises(LlmcError, match=r"a tile of a picture is an array \[3, 2, 4\], not \[2, 4, 3\]"):
        model.image(np.zeros((2, 4, 3), np.float32))
    with pytest.raises(LlmcError, match=r"rows are an array \[n, 16\], not \[16\]"):
        model.rows(np.zeros(16, np.float32))
    with pytest.raises(LlmcError, match="0 rows cannot be kept"):
        model.rows(np.zeros((0, 16), np.float32))


def test_an_artifact_without_rows_says_so(toy_so: Path) -> None:
    with llmc.load(toy_so) as model:
        for give in (model.rows, model.image):
            with pytest.raises(
                LlmcError, match=r"the artifact takes no (rows in the place of tokens|pictures)"
            ) as error:
                give(np.zeros((1, 16), np.float32))
            assert error.value.hint == "compile it with --images"


def test_rows_outlive_neither_their_model_nor_its_numbers(given_so: Path) -> None:
    model = llmc.load(given_so)
    given = model.rows(some(1))
    model.close()
    given.close()
    with pytest.raises(LlmcError, match="the model is closed"):
        given.numbers()


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


def test_an_artifact_whose_rows_lie_in_lines_and_columns_says_so_in_its_version() -> None:
    header = unpack_plan(GivenPlan().pack(), len(toy.weights_section()), "x").header._replace(tile=(0, 0, 0))
    for more in (
        header._replace(is_turned=True, slot_bytes=64, default_slots=3, adapters=("sql", "chat")),
        header._replace(sized=fmt.Sized(588, 2, 4, 80, 48, 4, 1)),
    ):
        packed = fmt.pack_plan_header(more)
        assert packed[4] == fmt.FORMAT_GRIDS
        assert fmt.unpack_plan_header(packed) == more
    sized = fmt.Sized(588, 2, 4, 80, 48, 4, 1)
    assert sized.place_words(256, 64) == 256 * (2 * (1 + 4) + 2 + 2 * 4)


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


def test_rows_are_for_cpus(given_so: Path, tmp_path: Path) -> None:
    refuse(given_so, tmp_path, GivenPlan().pack(device=1, cuda_arch=90))


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

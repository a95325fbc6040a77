"""Positions in three directions: what rows of pictures are turned by, and the text behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from tests.runtime import toy_given
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_given import some
from tests.runtime.toy_given import Floats, GivenPlan

Part = int | tuple[Floats, tuple[int, int]]


@pytest.fixture(scope="module")
def turned_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_given.build_artifact(tmp_path_factory.mktemp("turns"), GivenPlan(is_turned=True))


@pytest.fixture
def model(turned_so: Path) -> Iterator[Model]:
    with llmc.load(turned_so) as model:
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens
        assert model.info.n_rows == 0


def oracle(text: Sequence[Part]) -> list[list[int]]:
    """Logits after each token.  A picture is its rows and how many lines and columns; rows of none have one of each."""
    begin, rows = 0, list[int | Floats]()
    for part in text:
        if isinstance(part, int):
            rows.append(toy_given.turned(part, [begin] * 3))
            begin += 1
        else:
            numbers, (height, width) = part
            places = [(line, column) for line in range(height) for column in range(width)]
            rows += [
                toy_given.turned(row, [begin, begin + line, begin + column])
                for row, (line, column) in zip(numbers, places, strict=True)
            ]
            begin += max(height, width)
    return toy_given.oracle(rows)


def test_pictures_are_shorter_than_their_rows(model: Model) -> None:
    """In steps of any size, beside others, in copies, and after going back into a picture."""
    text: list[Part] = [*TEXT[:2], (some(6), (2, 3)), *TEXT[2:4], (some(4, seed=1), (4, 1)), (some(2), (1, 2)), 7, 8]
    wanted = oracle(text)
    with (
        model.rows(some(6), grid=(2, 3)) as one,
        model.rows(some(4, seed=1), (4, 1)) as two,
        model.rows(some(2), (1, 2)) as three,
    ):
        fed = [*TEXT[:2], *one.ids, *TEXT[2:4], *two.ids, *three.ids, 7, 8]
        assert model.logits(fed).tolist() == wanted
        for ends in ([1, 4, 5, 9, 18], [3, 8, 10, 13, 18], list(range(1, 19))):
            with model.sequence() as sequence, model.sequence() as other:
                for start, end in zip([0, *ends], ends, strict=False):
                    model.step([(other, TEXT[start:end]), (sequence, fed[start:end])])
                    assert sequence.logits().tolist() == wanted[end - 1]
                    assert other.logits().tolist() == oracle(TEXT[:end])[-1]
                for n in (17, 12, 9, 5, 3, 0):
                    with sequence.fork() as fork:
                        fork.truncate(n)
                        fork.feed(fed[n:])
                        assert fork.logits().tolist() == wanted[-1]
                        fork.truncate(n)
    with model.sequence() as sequence:
        sequence.feed(TEXT)
        assert sequence.logits().tolist() == oracle(TEXT)[-1]


def test_a_text_goes_on_from_a_part_of_a_picture(model: Model) -> None:
    """Behind the furthest of its rows, whether they are still there or given back."""
    for n, behind in ((1, 2), (3, 4), (4, 4), (6, 4), (9, 4)):
        places = [(line, column) for line in range(3) for column in range(3)][:n]
        turns = [[0] * 3, *([1, 1 + line, 1 + column] for line, column in places), [behind] * 3]
        moved = [toy_given.turned(*each) for each in zip([5, *some(9)[:n], 6], turns, strict=True)]
        with model.sequence() as sequence:
            with model.rows(some(9), (3, 3)) as given:
                sequence.feed([5, *given.ids[:n]])
            sequence.feed([6])
            assert sequence.logits().tolist() == toy_given.oracle(moved)[-1]


def test_rows_of_no_picture_are_as_tokens(model: Model, tmp_path: Path) -> None:
    with model.rows(some(3)) as given:
        wanted = oracle([4, *((row[None], (1, 1)) for row in some(3)), 5])
        assert model.logits([4, *given.ids, 5]).tolist() == wanted
    with model.sequence() as sequence, pytest.raises(LlmcError, match="6 rows do not lie in 2 lines of 2 columns"):
        model.rows(some(6), grid=(2, 2))
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        sequence.save(tmp_path / "text.seq")
    with model.restore(tmp_path / "text.seq") as sequence, model.rows(some(6), (3, 2)) as given:
        sequence.feed([*given.ids, 3])
        assert sequence.logits().tolist() == oracle([*TEXT[:5], (some(6), (3, 2)), 3])[-1]


def test_the_rows_of_a_picture_come_in_their_order(model: Model) -> None:
    with model.rows(some(6), (2, 3)) as given, model.sequence() as sequence:
        sequence.feed([1])
        a, b, c = given.ids[:3]
        for text in ([b], [a, c], [a, b, 3, c], [a, a, c]):
            with pytest.raises(LlmcError, match=r"row . of a picture stands for token . .*not behind the row") as error:
                sequence.feed(text)
            assert error.value.hint == "give a picture's rows in their order, from the first one on"
            assert sequence.length == 1
        sequence.feed([a, b])
        sequence.feed([c])


def test_a_model_without_directions_takes_pictures_as_rows(tmp_path: Path) -> None:
    path = toy_given.build_artifact(tmp_path, GivenPlan())
    with llmc.load(path) as model, model.rows(some(6), grid=(2, 3)) as given:
        assert model.logits([1, *given.ids]).tolist() == toy_given.oracle([1, *some(6)])


def test_guesses_are_checked_behind_pictures(model: Model) -> None:
    with model.rows(some(6), (2, 3)) as given:
        text = [*TEXT[:7], *given.ids, *TEXT[:5]]
        said = model.tokens(text, 8, ignore_eos=True)
        assert model.tokens(text, 8, ignore_eos=True, speculate=3) == said
        wanted: list[Part] = [*TEXT[:7], (some(6), (2, 3)), *TEXT[:5]]
        assert said[0] == int(np.argmax(oracle(wanted)[-1]))
        assert said[1] == int(np.argmax(oracle([*wanted, said[0]])[-1]))

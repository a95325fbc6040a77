"""Pictures whose rows see each other: they are read whole, in one step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.plan import unpack_plan
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.job import Ask, Job, Said
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_given
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_given import refuse, some
from tests.runtime.toy_given import TILE, TILE_ROWS, Floats, GivenPlan


@pytest.fixture(scope="module")
def sight_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_given.build_artifact(tmp_path_factory.mktemp("sight"), GivenPlan(picture_rows=TILE_ROWS))


@pytest.fixture
def model(sight_so: Path) -> Iterator[Model]:
    with llmc.load(sight_so) as model:
        yield model
        assert model.info.kv_tokens_free == model.info.kv_tokens
        assert model.info.n_rows == 0


def pictured(*pictures: tuple[range, Floats]) -> tuple[list[int], list[int | Floats]]:
    """A text with pictures at places that bodies of 2, 4 and 16 rows would cut; as it is fed, and for the oracle."""
    fed, wanted = list[int](), list[int | Floats]()
    for place, (ids, rows) in zip((1, 10, 3), pictures, strict=False):
        fed += [*TEXT[:place], *ids]
        wanted += [*TEXT[:place], *toy_given.seeing(rows)]
    return [*fed, *TEXT[5:9]], [*wanted, *TEXT[5:9]]


def test_no_step_cuts_a_picture(model: Model) -> None:
    assert model.info.picture_rows == TILE_ROWS
    assert model.logits(TEXT).tolist() == toy.oracle(TEXT)
    with (
        model.rows(some(3)) as one,
        model.rows(some(3, seed=1)) as two,
        model.image(np.ones(TILE, np.float32)) as three,
    ):
        assert [one.ids[0], two.ids[0], three.ids[0]] == [toy.VOCAB, toy.VOCAB + 3, toy.VOCAB + 6]
        fed, wanted = pictured(*((each.ids, each.numbers()) for each in (one, two, three)))
        logits = toy_given.oracle(wanted)
        assert model.logits(fed).tolist() == logits, "a step of 27 rows: one body of 16, and others"
        ends = [1, 4, 8, 14, 17, 20, 23, 27]
        with model.sequence() as sequence, model.sequence() as other:
            for start, end in zip([0, *ends], ends, strict=False):
                model.step([(other, TEXT[start : start + 2]), (sequence, fed[start:end])])
            assert sequence.logits().tolist() == logits[-1]
            with sequence.fork() as fork:
                assert fork.cut(16) == 14, "a picture stays whole, or goes"
                assert fork.cut(14) == 14
                fork.feed(fed[14:])
                assert fork.logits().tolist() == logits[-1]


@pytest.mark.parametrize("n_before", range(18))
def test_every_place_of_a_picture_is_read_right(model: Model, n_before: int) -> None:
    with model.rows(some(3)) as given:
        fed = [*TEXT[:n_before], *given.ids, *given.ids, 4]
        wanted: list[int | Floats] = [*TEXT[:n_before], *2 * toy_given.seeing(some(3)), 4]
        assert model.logits(fed).tolist() == toy_given.oracle(wanted)
        with model.sequence() as sequence, model.sequence() as other:
            model.step(
                [
                    (other, TEXT[:5]),
                    (sequence, fed),
                ]
            )
            assert sequence.logits().tolist() == toy_given.oracle(wanted)[-1]


def test_a_picture_is_given_whole(model: Model) -> None:
    with model.rows(some(3)) as given, model.sequence() as sequence:
        sequence.feed([1])
        a, b, c = given.ids
        for text in ([a, b], [a], [b, c], [c], [a, c, b], [2, a, b, 3, c], [a, b, c, b, c]):
            with pytest.raises(LlmcError, match=r"of a picture of 3 stands for token . of an input without") as error:
                sequence.feed(text)
            assert error.value.hint == "give the rows of a picture in one input, in their order"
            assert sequence.length == 1
        with pytest.raises(LlmcError, match="there are 3 of them, not 2"):
            model.rows(some(2))


def test_numbers_of_pictures_are_whole_for_who_cuts(model: Model) -> None:
    whole, base = model.info.whole, toy.VOCAB
    ids = [1, base + 3, base + 4, base + 5, base + 6, base + 7, base + 8, 2]
    assert [whole(ids, n) for n in range(10)] == [0, 1, 4, 4, 4, 7, 7, 7, 8, 9]


def test_a_server_cuts_no_picture_and_finds_those_that_were_read(model: Model) -> None:
    """Its chunks of 2 tokens end behind a picture, and so does what is shared, where a page of 4 would cut one."""
    with model.rows(some(3)) as one, model.rows(some(3, seed=1)) as two:
        begin = [*TEXT[:2], *one.ids, *TEXT[5:7], *two.ids]
        prompts = [[*begin, 4, 5], [*begin, 9], [*begin, 4, 5, 6], [*begin[:5], 8, *two.ids, 1], [*one.ids, 3]]
        wanted = [model.tokens(prompt, 5, ignore_eos=True) for prompt in prompts]
        news: list[Said] = []
        engine = Engine(model, news.extend, max_batch=3, queue=9, chunk=2)
        jobs = [Job(Ask(tuple(each), 5, ignore_eos=True), engine.room, None, news.append) for each in prompts]
        for some_jobs in (jobs[:1], jobs[1:]):
            engine.submit(some_jobs)
            while not all(job.finish for job in some_jobs):
                engine.collect()
                engine.turn()
        assert not [said.error for said in news if said.error]
        assert [job.tokens for job in jobs] == wanted
        assert [job.n_reused for job in jobs] == [0, 10, 12, 5, 0]
        engine.close()


def test_hostile_sizes_are_refused(sight_so: Path, tmp_path: Path) -> None:
    header = unpack_plan(GivenPlan(picture_rows=TILE_ROWS).pack(), len(toy.weights_section()), "x").header
    assert header.picture_rows == TILE_ROWS
    for n in (1, 17, 2**16 + 1, 2**32 - 1):
        refuse(sight_so, tmp_path, GivenPlan(picture_rows=TILE_ROWS).pack(picture_rows=n))
    refuse(sight_so, tmp_path, GivenPlan((0, 0, 0), picture_rows=TILE_ROWS).pack(picture_rows=17))
    refuse(sight_so, tmp_path, GivenPlan(picture_rows=TILE_ROWS).pack(picture_rows=0))
    plan = GivenPlan(picture_rows=TILE_ROWS)
    at = next(i for i, (name, _, _) in enumerate(plan.arguments) if name == "sees")
    for change in ((64, 64), (0, 2**40), (2**64 - 64, 128)):
        plan.arguments[at] = ("sees", *change)
        refuse(sight_so, tmp_path, plan.pack())

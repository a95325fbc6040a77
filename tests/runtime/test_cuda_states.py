"""Models with states on a GPU: slots in its memory, which steps, forks and guesses find there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY
from llmc.runtime.speculate import Guess, Guessed, speculate
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda, toy_model
from tests.runtime.serve.served import Served, prompt
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_cuda import FakeCuda
from tests.runtime.toy_cuda_states import build_artifact
from tests.runtime.toy_model import Refused
from tests.runtime.toy_states import SLOT_BYTES, SLOTS


@pytest.fixture(scope="module")
def states_code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return toy_cuda.build_code(tmp_path_factory.mktemp("states"))


@pytest.fixture
def written(states_code: bytes, tmp_path: Path) -> Callable[..., Path]:
    """A file of its own for each: one that is open must not be written over."""
    names = (f"{n}.so" for n in itertools.count())
    return lambda **changes: build_artifact(tmp_path / next(names), states_code, **changes)


@pytest.fixture
def model(cuda: FakeCuda, written: Callable[..., Path]) -> Iterator[Model]:
    with llmc.load(written(), kv_tokens=640) as model:
        yield model
        assert model.info.n_slots_free == SLOTS, "a slot was not given back"


def test_a_text_says_the_same_in_any_chunks_and_company(model: Model) -> None:
    assert (model.info.n_slots, model.info.slot_bytes) == (SLOTS, SLOT_BYTES)
    assert model.logits(TEXT).tolist() == toy.oracle(TEXT)
    with model.sequence() as one, model.sequence() as other:
        for start, stop in ((0, 3), (3, 4), (4, len(TEXT))):
            model.step([(one, TEXT[start:stop]), (other, TEXT[: stop - start])])
        assert one.logits().tolist() == toy.oracle(TEXT)[-1]


def test_slots_go_over_with_the_rest_of_a_steps_input(model: Model, cuda: FakeCuda) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:3])
        cuda.calls()
        sequence.feed(TEXT[3:4])
        n_bytes = 4 * 64 + 2 * 4 * toy.PAGES  # whole lines of tokens, rows, positions and slots; the page table is last
        assert [call for call in cuda.calls() if call.startswith("h2d")] == [f"h2d {n_bytes}"]


def test_a_fork_copies_the_state_on_the_device_when_it_is_written(model: Model, cuda: FakeCuda) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        with sequence.fork() as fork:
            cuda.calls()
            fork.feed([40])
            sequence.feed([41])  # it holds the state alone now
            assert cuda.calls().count(f"d2d {SLOT_BYTES}") == 1
            assert fork.logits().tolist() == toy.oracle([*TEXT[:5], 40])[-1]
            assert sequence.logits().tolist() == toy.oracle([*TEXT[:5], 41])[-1]


def test_a_saved_sequence_goes_on_with_its_state(model: Model, tmp_path: Path) -> None:
    text = list(TEXT[:5])
    with model.sequence() as sequence:
        sequence.feed(text)
        text += model.advance([(sequence, GREEDY)])
        sequence.save(tmp_path / "text.seq")
    with model.restore(tmp_path / "text.seq") as back:
        assert back.tokens == text
        text += model.advance([(back, GREEDY)])
        assert back.logits().tolist() == toy.oracle(text)[-1]


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_running_ahead_writes_the_states_of_its_rows(model: Model, batch: int) -> None:
    """Sequences change places between steps, so that the slots of a step are not those of the one before."""
    sequences = [model.sequence() for _ in range(batch)]
    texts = [TEXT[i : i + 3 + i] for i in range(batch)]
    model.step(list(zip(sequences, texts, strict=True)))
    for turn in range(4):
        order = [(i + turn) % batch for i in range(batch)]
        tokens = model.advance([(sequences[i], GREEDY) for i in order])
        for i, token in zip(order, tokens, strict=True):
            logits = toy.oracle(texts[i])[-1]
            assert token == logits.index(max(logits))
            texts[i] = [*texts[i], token]
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.logits().tolist() == toy.oracle(text)[-1]
        sequence.close()


def test_a_text_that_is_continued_does_not_run_ahead(model: Model, cuda: FakeCuda) -> None:
    """Its state would have met the token that ends it.  Others do, and so they need no step in between."""
    with model.sequence() as sequence:
        tokens = list(model.stream(TEXT[:4], 5, ignore_eos=True, sequence=sequence))
        assert sequence.length == 4 + 5 - 1
        more = list(model.stream(tokens[-1:], 3, ignore_eos=True, sequence=sequence))
        generation = model.stream(more[-1:], 20, ignore_eos=True, sequence=sequence)
        last = next(generation)
        generation.close()
        assert sequence.length == 4 + 5 + 3
    assert model.tokens(TEXT[:4], 9, ignore_eos=True) == [*tokens, *more, last]


def test_a_servers_texts_run_ahead_and_are_taken_up_as_a_whole(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    with llmc.load(written(), kv_tokens=640, slots=9) as model:
        served = Served(model, max_batch=3)
        first, other = served.job(prompt(11), 4), served.job(prompt(3, 3), 8)
        served.submit(first, other)
        cuda.calls()
        served.finish(first, other)
        assert any(call.endswith("(stream 2)") for call in cuda.calls())  # input that went over beside a step
        goes_on, differs = served.job((*first.ids, 5, 9), 4), served.job((*first.ids[:12], 9), 4)
        served.submit(goes_on, differs)
        served.finish(goes_on, differs)
        assert [job.n_reused for job in (first, goes_on, differs)] == [0, 14, 0]
        served.check(first, other, goes_on, differs)
        served.leave()
        assert model.info.n_slots_free == 9


def test_guesses_that_were_wrong_take_the_state_back(model: Model) -> None:
    said = model.tokens(TEXT[:5], max_tokens=6, ignore_eos=True)
    logits = np.empty((4, toy.VOCAB), np.float32)
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        ids = model.check_ids([said[0], said[1], 3, 4])
        assert speculate(model, [Guessed(sequence, GREEDY, ids, Guess(ids[1:].tolist()), logits)]) == [1]
        assert sequence.length == 7
        assert sequence.logits().tolist() == toy.oracle([*TEXT[:5], *said[:2]])[-1]


def test_a_copy_that_fails_loses_the_gpu_at_the_next_step(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    cuda.set(fail="cuMemcpyDtoDAsync:1:1")
    with llmc.load(written(), kv_tokens=640) as model, model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        with sequence.fork() as fork, pytest.raises(LlmcError, match="copying the states of a sequence failed"):
            fork.feed([40])


# -- memory ------------------------------------------------------------------------------------------------------------


def refusal(path: Path, **options: int) -> str:
    with pytest.raises(Refused) as caught, toy_model.Model(path, **options):
        pass
    return str(caught.value)


def test_slots_give_way_before_the_cache_does(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    """Of what is left beside the weights, half at most is for states, where all that is the default finds no room."""
    path = written(slot_bytes=1 << 20, default_slots=100, default_kv_tokens=1 << 28)
    cuda.set(free=168_000_000)
    with llmc.load(path) as model:
        info = model.info
        assert 40_000_000 < info.n_slots << 20 < 52_000_000
        assert 40_000_000 < info.kv_tokens * info.kv_bytes_per_token < 60_000_000
        assert model.logits(TEXT[:4]).tolist() == toy.oracle(TEXT[:4])
    with llmc.load(path, kv_tokens=640) as model:
        assert 85 < model.info.n_slots < 100  # a cache of a size that was asked for leaves all else
    cuda.set(free=300_000_000)
    with llmc.load(path, kv_tokens=640) as model:
        assert model.info.n_slots == 100


def test_states_that_find_no_room_are_said(cuda: FakeCuda, written: Callable[..., Path]) -> None:
    path = written(slot_bytes=1 << 20, default_slots=8)
    cuda.set(free=100_000_000)
    fact, _, hint = refusal(path, n_slots=64).splitlines()
    assert re.search(r"needs 0\.13 GB on Fake GPU 0 \(.*, states of 64 sequences 0\.07, activations 0\.00\)", fact)
    assert hint.strip() == "hint: ask for fewer slots"
    cuda.set(free=1000)
    assert "free memory on the GPU, or take a larger one" in refusal(path)
    cuda.set(free=10**12)
    assert "states of 1 sequences" in refusal(written(slot_bytes=1 << 62))
    assert cuda.live == 0

"""Models with states: a slot for each sequence, which goes forwards alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY
from llmc.runtime.plan import unpack_plan
from llmc.runtime.prompt_cache import PromptCache
from llmc.runtime.speculate import DraftModel, Guess, Guessed, Speculation, speculate
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_states
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_speculate import Oracle, alone
from tests.runtime.toy_states import SLOT_BYTES, SLOTS, StatePlan

POISONED = [*TEXT[:3], toy.POISON]


@pytest.fixture(scope="module")
def states_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_states.build_artifact(tmp_path_factory.mktemp("states"))


@pytest.fixture
def model(states_so: Path) -> Iterator[Model]:
    with llmc.load(states_so, kv_tokens=640) as model:
        yield model
        assert model.info.n_slots_free == SLOTS, "a slot was not given back"
        assert model.info.kv_tokens_free == model.info.kv_tokens


def test_a_text_says_the_same_in_any_chunks_and_company(model: Model) -> None:
    assert model.has_states
    assert (model.info.n_slots, model.info.slot_bytes) == (SLOTS, SLOT_BYTES)
    assert model.logits(TEXT).tolist() == toy.oracle(TEXT)
    with model.sequence() as one, model.sequence() as other:
        for start, stop in ((0, 3), (3, 4), (4, len(TEXT))):
            model.step([(one, TEXT[start:stop]), (other, TEXT[: stop - start])])
        assert one.logits().tolist() == toy.oracle(TEXT)[-1]


def test_a_slot_is_taken_with_the_first_token_and_given_back(model: Model) -> None:
    with model.sequence() as sequence:
        assert model.info.n_slots_free == SLOTS
        for text in (TEXT[:5], TEXT[2:9]):  # a slot that was another text's begins with zeros all the same
            sequence.feed(text)
            assert model.info.n_slots_free == SLOTS - 1
            assert sequence.logits().tolist() == toy.oracle(text)[-1]
            sequence.truncate(0)
            assert model.info.n_slots_free == SLOTS


def test_no_slot_is_one_clear_error_and_changes_nothing(model: Model) -> None:
    sequences = [model.sequence() for _ in range(SLOTS + 1)]
    for sequence in sequences[:-1]:
        sequence.feed(TEXT[:3])
    with pytest.raises(LlmcError, match=r"no slot for a sequence's state: 5 of 5 are taken") as error:
        model.step([(sequence, TEXT[3:4]) for sequence in sequences])
    assert error.value.hint == "free a sequence, or open with more slots"
    assert [sequence.length for sequence in sequences] == [3] * SLOTS + [0]
    sequences[0].close()
    sequences[-1].feed(TEXT[:3])
    model.step([(sequence, TEXT[3:4]) for sequence in sequences[1:]])
    for sequence in sequences[1:]:
        assert sequence.logits().tolist() == toy.oracle(TEXT[:4])[-1]
        sequence.close()


def test_slots_are_as_many_as_are_asked_for(states_so: Path) -> None:
    with llmc.load(states_so, slots=2) as model:
        assert model.info.n_slots == 2
    with pytest.raises(LlmcError, match="slots cannot be negative"):
        llmc.load(states_so, slots=-1)


def test_a_fork_goes_its_own_way_and_takes_a_slot_when_it_does(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        with sequence.fork() as twin, twin.fork() as third:
            assert model.info.n_slots_free == SLOTS - 1
            twin.feed(TEXT[7:9])
            assert model.info.n_slots_free == SLOTS - 2
            sequence.feed(TEXT[5:8])
            assert twin.logits().tolist() == toy.oracle([*TEXT[:5], *TEXT[7:9]])[-1]
            assert sequence.logits().tolist() == toy.oracle(TEXT[:8])[-1]
            third.feed(TEXT[5:6])  # the last one that holds it: no copy
            assert model.info.n_slots_free == SLOTS - 3
            assert third.logits().tolist() == toy.oracle(TEXT[:6])[-1]


def test_a_state_does_not_go_back(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:6])
        with pytest.raises(LlmcError, match="states, which do not go back: a sequence of 6 tokens cannot be cut to 4"):
            sequence.truncate(4)
        assert sequence.logits().tolist() == toy.oracle(TEXT[:6])[-1]
        assert sequence.cut(6) == 6
        assert sequence.cut(4) == sequence.length == 0


def test_a_step_that_fails_leaves_its_sequences_empty(model: Model) -> None:
    with model.sequence() as sequence, model.sequence() as other:
        sequence.feed(TEXT[:3])
        other.feed(TEXT[:3])
        with pytest.raises(LlmcError, match="failed"):
            sequence.feed(POISONED)
        assert (sequence.length, other.length) == (0, 3)
        sequence.feed(TEXT[:4])
        assert sequence.logits().tolist() == toy.oracle(TEXT[:4])[-1]


def test_a_sequence_is_repeated_with_its_state(model: Model) -> None:
    with model.sequence() as sequence:
        sequence.feed(TEXT[:4])
        with sequence.repeat(4) as copy:
            copy.feed(TEXT[4:6])
            assert copy.logits().tolist() == toy.oracle(TEXT[:6])[-1]


def test_a_saved_sequence_goes_on_with_its_state(model: Model, tmp_path: Path) -> None:
    for n in (1, 5, 8, 29):
        with model.sequence() as sequence:
            sequence.feed(TEXT[:n])
            sequence.save(tmp_path / "text.seq")
        with model.restore(tmp_path / "text.seq") as back, back.fork() as fork:
            assert model.info.n_slots_free == SLOTS - 1
            fork.feed([9])
            back.feed(TEXT[n:])
            assert back.tokens == TEXT
            assert back.logits().tolist() == toy.oracle(TEXT)[-1]
            assert fork.logits().tolist() == toy.oracle([*TEXT[:n], 9])[-1]


def test_no_slot_for_what_is_restored_is_one_clear_error(states_so: Path, tmp_path: Path) -> None:
    with llmc.load(states_so, slots=1) as model, model.sequence() as sequence:
        sequence.feed(TEXT[:5])
        sequence.save(tmp_path / "text.seq")
        with pytest.raises(LlmcError, match="no slot for a sequence's state: 1 of 1 are taken"):
            model.restore(tmp_path / "text.seq")
        assert sequence.logits().tolist() == toy.oracle(TEXT[:5])[-1]


def test_a_prompt_is_kept_where_it_parts_from_the_one_before(model: Model, tmp_path: Path) -> None:
    """A state does not go back there: so from the second prompt on what they have in common is read once more, and the
    third finds it."""
    path, found, kept = tmp_path / "prompt.seq", [], []
    for end in ([4, 8], [4, 8], [9], [11, 2], [4, 9]):
        cache = PromptCache(path)
        prompt = [*TEXT[:16], *end]
        said = list(model.stream(prompt, 4, ignore_eos=True, cache=cache))
        assert said == model.tokens(prompt, 4, ignore_eos=True)
        found.append(cache.n_found)
        with model.restore(path) as sequence:
            kept.append(sequence.length)
    assert found == [0, 18, 0, 16, 16]
    assert kept == [18, 18, 16, 16, 16]


# -- guesses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [2, 1])
@pytest.mark.parametrize("wrong", [1, 2, 7, 100])
def test_the_text_is_that_of_one_token_at_a_time(states_so: Path, wrong: int, slots: int) -> None:
    """Without a slot beside the sequence's own nothing is guessed."""
    with llmc.load(states_so, slots=slots) as model:
        said, text = alone(model, GREEDY, 20), list(TEXT[:5])
        speculation = Speculation(model, Oracle(said, wrong), most=6)
        with model.sequence() as sequence:
            sequence.feed(text)
            while len(text) < len(said):
                text.append(sequence.sample())
                text += speculation.feed(sequence, text, GREEDY, len(said) - len(text))
                assert sequence.length == len(text)
                assert sequence.logits().tolist() == toy.oracle(text)[-1]
                assert model.info.n_slots_free == slots - 1
        assert text == said
        assert (speculation.n_right > 0) == (slots > 1 and wrong > 1)
        assert model.info.kv_tokens_free == model.info.kv_tokens


def test_guesses_of_several_share_the_slots_that_there_are(states_so: Path) -> None:
    """A fork and what it is of need a slot in any case, and go back to what they shared; the other has none left."""
    with llmc.load(states_so, slots=4) as model:
        said, logits = alone(model, GREEDY, 5), np.empty((3, 6, toy.VOCAB), np.float32)
        with model.sequence() as first, model.sequence() as second:
            first.feed(said[:6])
            second.feed(said[:6])
            with second.fork() as third:
                guess, ids = Guess([*said[7:9], 3]), model.check_ids([*said[6:9], 3])
                texts = zip((first, third, second), logits, strict=True)
                inputs = [Guessed(one, GREEDY, ids, guess, rows) for one, rows in texts]
                assert speculate(model, inputs) == [0, 2, 2]
                for sequence, n in ((first, 7), (third, 9), (second, 9)):
                    assert sequence.length == n
                    assert sequence.logits().tolist() == toy.oracle(said[:n])[-1]
            assert model.info.n_slots_free == 2


def test_a_draft_with_states_guesses_beside_the_text(states_so: Path, toy_so: Path) -> None:
    with llmc.load(states_so) as draft, llmc.load(toy_so) as model:
        said, text = alone(model, GREEDY, 12), list(TEXT[:5])
        guesser = DraftModel(draft, model)
        assert guesser.guess(text, GREEDY, 4) == said[5:9]
        assert guesser.guess(said[:8], GREEDY, 3) == said[8:11]
        assert guesser.guess([*said[:3], 9], GREEDY, 2) == alone_from(model, [*said[:3], 9], 2)
        guesser.begin_anew()
        assert guesser.guess([*said[:3], 9, 4], GREEDY, 1) == alone_from(model, [*said[:3], 9, 4], 1)
        guesser.close()
        assert draft.info.n_slots_free == SLOTS


def alone_from(model: Model, text: list[int], n: int) -> list[int]:
    return model.tokens(text, max_tokens=n, ignore_eos=True)


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_artifact_with_states_says_so_in_its_version() -> None:
    plain, with_states = toy.ToyPlan().pack(), StatePlan().pack()
    assert [plain[4], with_states[4]] == [3, 4]
    header = unpack_plan(with_states, len(toy.weights_section()), "x").header
    assert (header.slot_bytes, header.default_slots) == (SLOT_BYTES, SLOTS)
    assert fmt.unpack_plan_header(plain).slot_bytes == 0


HOSTILE = {
    "slot_bytes": (1, 63, 65, 2**63 + 32),
    "default_slots": (0,),
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in HOSTILE.items() for value in values])
def test_hostile_states_are_refused(states_so: Path, tmp_path: Path, field: str, value: int) -> None:
    refuse(states_so, tmp_path, StatePlan().pack(**{field: value}))


@pytest.mark.parametrize("space", ["states", "slots"])
@pytest.mark.parametrize("change", [(64, 64), (0, 2**40), (2**64 - 64, 128)])
def test_arguments_outside_of_states_are_refused(
    states_so: Path, tmp_path: Path, space: str, change: tuple[int, int]
) -> None:
    plan = StatePlan()
    at = next(i for i, (name, _, _) in enumerate(plan.arguments) if name == space)
    plan.arguments[at] = (space, *change)
    refuse(states_so, tmp_path, plan.pack())


def test_a_plan_without_states_may_not_name_any(states_so: Path, tmp_path: Path) -> None:
    refuse(states_so, tmp_path, StatePlan().pack(slot_bytes=0, default_slots=0))


def test_states_that_no_memory_holds_are_refused(states_so: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="there is no memory for the states of 5 sequences"):
        llmc.load(spoiled(states_so, tmp_path, StatePlan().pack(slot_bytes=2**62)))


@pytest.mark.parametrize("n_bytes", [120, 128, 135])
def test_a_header_that_is_cut_off_is_refused(states_so: Path, tmp_path: Path, n_bytes: int) -> None:
    refuse(states_so, tmp_path, StatePlan().pack()[:n_bytes])


def spoiled(path: Path, folder: Path, plan: bytes) -> Path:
    code = (path.parent / "code.so").read_bytes()
    (folder / "spoiled.so").write_bytes(toy.pack_sections(toy_states.sections(code) | {"plan": plan}))
    return folder / "spoiled.so"


def refuse(path: Path, folder: Path, plan: bytes) -> None:
    """By the runtime, and by what reads a plan in Python."""
    with pytest.raises(LlmcError, match=r"the plan|call \d+ of"):
        llmc.load(spoiled(path, folder, plan))
    with pytest.raises(LlmcError, match="the plan section is not valid"):
        unpack_plan(plan, len(toy.weights_section()), "x")

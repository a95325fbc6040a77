"""Speculative decoding: guesses are checked in one step, and the text is the same as without them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import llmc
from llmc.cli.main import main
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.runner import Logits
from llmc.runtime.sequence import Sequence as TextSequence
from llmc.runtime.speculate import (
    DraftModel,
    Guess,
    Guessed,
    InTurns,
    PromptLookup,
    Speculation,
    TextGuesses,
    speculate,
)
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_cuda import FakeCuda

PROMPT = TEXT[:5]
DRAWN = How(1.5, 5, 0.9, 3)


@pytest.fixture(params=["cpu", "gpu"])
def model(request: pytest.FixtureRequest, cuda: FakeCuda, toy_so: Path, cuda_so: Path) -> Iterator[Model]:
    with llmc.load(toy_so if request.param == "cpu" else cuda_so, kv_tokens=640) as model:
        yield model


class Oracle:
    """Guesses right but for every so manieth token of the text."""

    def __init__(self, said: Sequence[int], wrong: int) -> None:
        self.said, self.wrong = said, wrong

    def guess(self, text: Sequence[int], how: How, most: int) -> list[int]:
        places = range(len(text), min(len(text) + most, len(self.said)))
        return [(self.said[i] + (i % self.wrong == 0)) % toy.VOCAB for i in places]

    def close(self) -> None: ...


def alone(model: Model, how: How, n: int) -> list[int]:
    """The text of one token at a time."""
    with model.sequence() as sequence:
        text = list(PROMPT)
        sequence.feed(text)
        for _ in range(n):
            text.append(sequence.sample(how))
            sequence.feed(text[-1:])
        return text


@pytest.mark.parametrize("wrong", [1, 2, 7, 100])
def test_the_text_is_that_of_one_token_at_a_time(model: Model, wrong: int) -> None:
    follow(model, GREEDY, wrong)


@pytest.mark.parametrize("wrong", [2, 100])
def test_a_text_is_drawn_as_one_token_at_a_time_is(toy_so: Path, wrong: int) -> None:
    with llmc.load(toy_so) as model:
        follow(model, DRAWN, wrong)


def follow(model: Model, how: How, wrong: int) -> None:
    text = list(PROMPT)
    said = alone(model, how, 24)
    speculation = Speculation(model, Oracle(said, wrong), most=6)
    with model.sequence() as sequence:
        sequence.feed(text)
        while len(text) < len(said):
            text.append(sequence.sample(how))
            text += speculation.feed(sequence, text, how, len(said) - len(text))
            assert sequence.length == len(text)
            assert sequence.logits().tolist() == toy.oracle(text)[-1]
        assert text == said
        assert sequence.sample(how) == alone(model, how, 25)[-1]
    assert model.info.kv_tokens_free == model.info.kv_tokens
    assert (speculation.n_right == 0) == (wrong == 1)
    if wrong == 100:
        assert speculation.n_right == speculation.n_guessed > 24 / 2


def test_wrong_guesses_leave_pages_and_other_sequences_alone(model: Model) -> None:
    logits = np.empty((1 + 20, model.info.n_vocab), np.float32)
    with model.sequence() as sequence, model.sequence() as other:
        sequence.feed(PROMPT)
        with sequence.fork() as twin:  # of a page that is not full
            other.feed(PROMPT[:3])
            n_free = model.info.kv_tokens_free
            token = sequence.sample()
            inputs = Guessed(sequence, GREEDY, model.check_ids([token, *[3] * 20]), Guess([3] * 20), logits)
            assert speculate(model, [inputs]) == [0]
            assert model.info.kv_tokens_free >= n_free - model.page_tokens
            assert twin.logits().tolist() == toy.oracle(PROMPT)[-1]
            assert other.logits().tolist() == toy.oracle(PROMPT[:3])[-1]
            assert sequence.logits().tolist() == toy.oracle([*PROMPT, token])[-1]
            twin.feed([token])
            assert twin.sample() == sequence.sample()


def test_a_step_has_prompts_beside_guesses(model: Model) -> None:
    said = alone(model, GREEDY, 9)
    logits = np.empty((10, model.info.n_vocab), np.float32)
    with model.sequence() as guessed, model.sequence() as prompt:
        guessed.feed(said[:3])
        right = Guessed(guessed, GREEDY, model.check_ids([*said[3:9], 3, 3]), Guess([*said[7:9], 3, 3]), logits)
        assert speculate(model, [Guessed(prompt, GREEDY, model.check_ids(TEXT[:7]), Guess([]), None), right]) == [0, 2]
        assert prompt.logits().tolist() == toy.oracle(TEXT[:7])[-1]
        assert guessed.logits().tolist() == toy.oracle(said[:9])[-1]


def test_guesses_are_checked_among_the_tokens_that_are_allowed(model: Model) -> None:
    logits = np.empty((4, model.info.n_vocab), np.float32)
    n_words = -(-toy.VOCAB // 32)
    for n_right in range(4):
        text = list(PROMPT)
        masks = np.random.default_rng(n_right).integers(0, 1 << 32, (3, n_words), dtype=np.uint32)
        with model.sequence() as alone:
            alone.feed(text)
            for mask in [None, *masks]:
                text.append(alone.sample(GREEDY if mask is None else GREEDY.among(mask)))
                alone.feed(text[-1:])
        guesses = text[-3:]
        guesses[n_right:] = [3] * (3 - n_right)
        wanted = next((i for i, guess in enumerate(guesses) if guess != text[i - 3]), 3)
        with model.sequence() as sequence:
            sequence.feed(PROMPT)
            ids = model.check_ids([text[-4], *guesses])
            assert speculate(model, [Guessed(sequence, GREEDY, ids, Guess(guesses, masks), logits)]) == [wanted]


def test_what_cannot_be_checked_is_refused_and_nothing_is_appended(model: Model) -> None:
    logits = np.empty((3, model.info.n_vocab), np.float32)
    mask = np.full(-(-toy.VOCAB // 32), 0xFFFFFFFF, np.uint32)
    with model.sequence() as sequence:
        sequence.feed(PROMPT)

        def refused(match: str, tokens: list[int], n: int, how: How = GREEDY, room: Logits | None = logits) -> None:
            guessed = Guessed(sequence, how, np.array(tokens, np.int32), Guess(tokens[len(tokens) - n :]), room)
            with pytest.raises(LlmcError, match=match):
                speculate(model, [guessed])

        refused("asks for more than", [1, 2], 1, GREEDY.among(mask))
        refused("asks for more than", [1, 2], 1, How(logit_bias=((3, 1.0),)))
        refused("out of range", [1, toy.VOCAB], 1)
        refused("2 tokens, and 2 of them are guesses", [1, 2], 2)
        refused("no tokens", [], 0)
        refused("no room for logits", [1, 2], 1, room=None)
        assert sequence.length == len(PROMPT)
        sequence.feed(TEXT[: toy.CONTEXT - len(PROMPT) - 1])
        refused("context", [1, 2], 1)
        assert sequence.length == toy.CONTEXT - 1


@pytest.mark.parametrize("how", [GREEDY, DRAWN, How(1.5, seed=2, presence_penalty=1.0)])
def test_a_generation_says_the_same_with_guesses(toy_so: Path, how: How) -> None:
    with llmc.load(toy_so) as model, model.sequence() as sequence:
        for max_tokens, ignore_eos in ((9, False), (0, False), (1, False), (20, True), (toy.CONTEXT, True)):
            plain = model.stream(PROMPT, max_tokens, how, ignore_eos=ignore_eos, sequence=sequence)
            said, length = list(plain), sequence.length
            sequence.truncate(0)
            guesses = Speculation(model, Oracle([*PROMPT, *said, *said], 5), most=4)
            guided = model.stream(
                PROMPT, max_tokens, how, ignore_eos=ignore_eos, sequence=sequence, speculation=guesses
            )
            assert (list(guided), guided.stop, sequence.length) == (said, plain.stop, length)
            assert (guesses.n_right > 0) == (len(said) > 2 and how.is_plain)
            sequence.truncate(0)


def test_a_generation_that_is_left_takes_back_guesses_that_nobody_has_seen(toy_so: Path) -> None:
    with llmc.load(toy_so) as model, model.sequence() as sequence:
        said = model.tokens(PROMPT, 12, ignore_eos=True)
        guesses = Speculation(model, Oracle([*PROMPT, *said], 100), most=6)
        stream = model.stream(PROMPT, 12, ignore_eos=True, sequence=sequence, speculation=guesses)
        assert [next(stream) for _ in range(4)] == said[:4]
        stream.close()
        assert sequence.length == len(PROMPT) + 3
        assert list(model.stream(said[3:4], 3, ignore_eos=True, sequence=sequence)) == said[4:7]


def test_the_command_line_says_how_guesses_fared(toy_so: Path) -> None:
    def run(*arguments: object) -> Result:
        ids = ",".join(map(str, PROMPT))
        return CliRunner().invoke(main, ["run", str(toy_so), "--tokens", ids, *map(str, arguments)])

    said = json.loads(run("-n", 12, "--ignore-eos", "--json").stdout)["tokens"]
    for options in (["--speculate", 3], ["--draft", toy_so]):
        found = json.loads(run("-n", 12, "--ignore-eos", "--json", *options).stdout)
        assert found["tokens"] == said
        assert 0 < found["speculation"]["steps"] <= 11
    assert found["speculation"]["right"] == found["speculation"]["guessed"] >= 9
    assert "guesses right" in run("-n", 12, "--draft", toy_so).stderr
    assert "speculation" not in json.loads(run("-n", 2, "--json", "--speculate", 0, "--draft", toy_so).stdout)


def test_a_lookup_guesses_what_came_after_the_longest_run_that_is_repeated() -> None:
    lookup = PromptLookup(toy.VOCAB)
    text = [1, 2, 3, 4, 9, 2, 3, 5, 8]
    assert lookup.guess(text, GREEDY, 4) == []
    text += [2, 3]
    assert lookup.guess(text, GREEDY, 4) == [5, 8, 2, 3]  # the latest of two places
    assert lookup.guess(text, GREEDY, 6) == [5, 8, 2, 3, 5, 8]  # and on in the guess itself
    text[-2:] = [1, 2, 3]
    assert PromptLookup(toy.VOCAB).guess(text, GREEDY, 2) == [4, 9]  # the longer run
    assert lookup.guess([*text, 7], GREEDY, 2) == []
    row = toy.VOCAB
    assert PromptLookup(toy.VOCAB).guess([1, 2, 5, row, 6, 1, 2], GREEDY, 4) == [5], "a row is no guess"


def test_guesses_that_find_no_pages_are_left_out(toy_so: Path) -> None:
    with llmc.load(toy_so, kv_tokens=toy.PAGE_TOKENS * 2) as model:
        said = alone(model, GREEDY, 2 * toy.PAGE_TOKENS - len(PROMPT))
        guesses = Speculation(model, Oracle([*said, 3, 3, 3, 3], 100), most=4)
        stream = model.stream(PROMPT, len(said), ignore_eos=True, speculation=guesses)
        assert [token for token, _ in zip(stream, said[len(PROMPT) :], strict=False)] == said[len(PROMPT) :]
        with pytest.raises(LlmcError, match="cache is full"):
            list(stream)


def test_a_draft_gives_its_pages_back(toy_so: Path) -> None:
    with llmc.load(toy_so) as model, llmc.load(toy_so, kv_tokens=toy.CONTEXT) as draft:
        streams = [model.stream(PROMPT, 12, speculation=Speculation.of(model, 3, draft)) for _ in range(3)]
        for stream in streams:
            list(stream)
            assert stream.speculation is not None
            assert stream.speculation.n_right == stream.speculation.n_guessed > 0
        assert draft.info.kv_tokens_free == draft.info.kv_tokens


def test_a_draft_reads_what_is_new_in_a_text_that_begins_as_the_last_did(
    model: Model, toy_so: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = alone(model, GREEDY, 24)
    n_read: list[int] = []
    with llmc.load(toy_so) as draft:
        feed = TextSequence.feed

        def counted(sequence: TextSequence, ids: list[int]) -> None:
            n_read.append(len(ids))
            feed(sequence, ids)

        monkeypatch.setattr(TextSequence, "feed", counted)
        guesser = DraftModel(draft, model)
        for text, n_new in ((said[:12], 12), (said[:14], 2), (said[:10], 1), ([*said[:6], 3, 3], 2)):
            n_read.clear()
            turn = InTurns(guesser)
            assert turn.guess(text, GREEDY, 1) == [int(np.argmax(toy.oracle(text)[-1]))]
            assert n_read == [n_new]
            turn.close()
        turn.guess(TEXT[: toy.CONTEXT], GREEDY, 2)  # leaves no room, and gives its pages back
        turn.close()
        assert turn.guess(said[:8], GREEDY, 2) == said[8:10]


def test_right_guesses_never_slow_the_pace() -> None:
    guesses = TextGuesses(Oracle([5] * 20, 100), 7)
    for guessed, right, wanted in ((1, 1, 7), (7, 2, 3), (1, 1, 3), (3, 3, 6), (6, 6, 7), (4, 0, 1), (0, 0, 1)):
        guesses.learn(guessed, right)
        assert guesses.guess([5], GREEDY, 15).ids == [5] * wanted


def test_a_draft_model_guesses_what_it_would_say(model: Model, toy_so: Path) -> None:
    how = GREEDY if model.info.device != "CPU" else DRAWN
    said = alone(model, how, 24)
    with llmc.load(toy_so) as draft:
        guesser = DraftModel(draft, model)
        for end in (5, 6, 9, 10, 10, 14):
            assert guesser.guess(said[:end], how, 4) == said[end : end + 4]
        wrong = [*said[:15], (said[15] + 1) % toy.VOCAB]
        guesses = guesser.guess(wrong, GREEDY, 2)
        assert guesses[0] == int(np.argmax(toy.oracle(wrong)[-1]))
        assert guesser.guess(TEXT[: toy.CONTEXT], GREEDY, 2) == []

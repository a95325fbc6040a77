"""Steps through the C interface: chunks, batches, pages and threads never change what a sequence says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime.toy_model import ARGUMENT, KERNEL, MEMORY, Model, Refused

TEXT = [3, 5, 9, 11, 2, 4, 4, 8, 50, 33, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 1, 59, 0, 22, 23, 24, 25, 26, 27, 28]


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def model(toy_so: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model(toy_so, n_threads=request.param, kv_tokens=640) as model:
        yield model


def test_logits_agree_with_the_oracle_after_every_token(model: Model) -> None:
    sequence = model.sequence()
    for token, expected in zip(TEXT, toy.oracle(TEXT), strict=True):
        sequence.feed([token])
        assert sequence.logits() == expected


@pytest.mark.parametrize("split", range(1, len(TEXT)))
def test_any_split_of_a_prompt_gives_the_same_logits(toy_so: Path, split: int) -> None:
    with Model(toy_so) as model:
        sequence = model.sequence(TEXT[:split])
        assert sequence.logits() == toy.oracle(TEXT[:split])[-1]
        sequence.feed(TEXT[split:])
        assert sequence.logits() == toy.oracle(TEXT)[-1]


def test_logits_of_all_tokens_are_given_when_asked(model: Model) -> None:
    texts = [TEXT, TEXT[4:9], TEXT[::-1], TEXT[7:8]]
    said = model.step([(model.sequence(), text) for text in texts], all_logits=True)
    assert said == [[x for row in toy.oracle(text) for x in row] for text in texts]


def test_sequences_in_one_step_do_not_see_each_other(model: Model) -> None:
    chance = random.Random(1)
    texts = [chance.choices(range(toy.POISON), k=toy.CONTEXT) for _ in range(4)]
    sequences, lengths = [model.sequence() for _ in texts], [0] * len(texts)
    while min(lengths) < toy.CONTEXT:
        chosen = [i for i in range(4) if lengths[i] < toy.CONTEXT and chance.random() < 0.7]
        parts = [(i, min(chance.randint(1, 9), toy.CONTEXT - lengths[i])) for i in chosen]
        model.step([(sequences[i], texts[i][lengths[i] : lengths[i] + n]) for i, n in parts])
        for i, n in parts:
            lengths[i] += n
            assert sequences[i].logits() == toy.oracle(texts[i][: lengths[i]])[-1]


def test_an_empty_step_does_nothing(model: Model) -> None:
    assert model.step([]) == []


def test_a_sequence_takes_its_whole_context_and_no_token_more(model: Model) -> None:
    sequence = model.sequence(TEXT)
    assert len(sequence) == toy.CONTEXT
    with pytest.raises(Refused, match="1 tokens after 30 are more than the context of 30") as refused:
        sequence.feed([1])
    assert refused.value.status == ARGUMENT
    assert sequence.logits() == toy.oracle(TEXT)[-1]


@pytest.mark.parametrize(
    ("bad", "status", "words"),
    [
        ([1, -1], ARGUMENT, "token -1 is out of range: the vocabulary has 61"),
        ([toy.VOCAB], ARGUMENT, "token 61 is out of range"),
        ([], ARGUMENT, "input 1 of the step has no tokens"),
        ([1] * 31, ARGUMENT, "31 tokens after 0 are more than the context"),
        ([1, toy.POISON], KERNEL, r"kernel 'embed_\d+' failed"),
    ],
)
def test_a_refused_step_appends_nothing(model: Model, bad: list[int], status: int, words: str) -> None:
    good, other = model.sequence(TEXT[:5]), model.sequence()
    free = model.info().kv_tokens_free
    with pytest.raises(Refused, match=words) as refused:
        model.step([(good, TEXT[5:18]), (other, bad)])
    assert refused.value.status == status
    assert (len(good), len(other), model.info().kv_tokens_free) == (5, 0, free)
    good.feed(TEXT[5:9])
    assert good.logits() == toy.oracle(TEXT[:9])[-1]


def test_a_sequence_may_be_in_a_step_once(model: Model) -> None:
    sequence = model.sequence()
    with pytest.raises(Refused, match="input 1 of the step is there twice"):
        model.step([(sequence, [1]), (sequence, [2])])
    assert len(sequence) == 0


def test_a_full_cache_is_an_error_until_pages_are_given_back(toy_so: Path) -> None:
    with Model(toy_so, kv_tokens=32) as model:
        first, second = model.sequence(TEXT[:17]), model.sequence(TEXT[:9])
        with pytest.raises(Refused, match="the KV cache is full: the step has 4 tokens") as refused:
            second.feed(TEXT[9:13])
        assert refused.value.status == MEMORY
        assert second.logits() == toy.oracle(TEXT[:9])[-1]
        first.truncate(16)
        second.feed(TEXT[9:13])
        assert second.logits() == toy.oracle(TEXT[:13])[-1]
        assert model.info().kv_tokens_free == 0


def test_an_impossible_cache_is_refused_with_its_size(toy_so: Path) -> None:
    for n_tokens in (2**42, 2**62, 2**64 - 1):
        with pytest.raises(Refused, match=f"KV cache of {n_tokens} tokens: .* pages of 512 bytes") as refused:
            Model(toy_so, kv_tokens=n_tokens)
        assert refused.value.status == MEMORY


# -- fork and truncate ------------------------------------------------------------------------------------------------


def test_a_fork_shares_pages_and_then_goes_its_own_way(model: Model) -> None:
    first = model.sequence(TEXT[:10])
    free = model.info().kv_tokens_free
    forks = [first.fork() for _ in range(3)]
    assert model.info().kv_tokens_free == free
    assert [fork.logits() for fork in forks] == [toy.oracle(TEXT[:10])[-1]] * 3
    model.step([(fork, [40 + i]) for i, fork in enumerate(forks)])
    assert model.info().kv_tokens_free == free - 3 * toy.PAGE_TOKENS  # two full pages are shared, the third is not
    for i, fork in enumerate(forks):
        assert fork.logits() == toy.oracle([*TEXT[:10], 40 + i])[-1]
    first.feed(TEXT[10:20])
    assert first.logits() == toy.oracle(TEXT[:20])[-1]


def test_a_fork_outlives_its_original(model: Model) -> None:
    first = model.sequence(TEXT[:10])
    fork = first.fork()
    first.free()
    model.sequence(TEXT[::-1])
    fork.feed(TEXT[10:])
    assert fork.logits() == toy.oracle(TEXT)[-1]


def test_cutting_into_a_shared_page_leaves_the_other_sequence_alone(model: Model) -> None:
    first = model.sequence(TEXT[:12])
    fork = first.fork()
    fork.truncate(6)
    fork.feed([1, 2, 3])
    first.feed(TEXT[12:14])
    assert fork.logits() == toy.oracle([*TEXT[:6], 1, 2, 3])[-1]
    assert first.logits() == toy.oracle(TEXT[:14])[-1]


def test_a_cut_sequence_has_no_logits_until_it_is_fed(model: Model) -> None:
    sequence = model.sequence(TEXT[:9])
    sequence.truncate(9)
    assert sequence.logits() == toy.oracle(TEXT[:9])[-1]
    sequence.truncate(8)
    with pytest.raises(Refused, match="the sequence has no logits"):
        sequence.logits()
    with pytest.raises(Refused, match="the sequence has no logits"):
        sequence.sample()
    sequence.feed([7])
    assert sequence.logits() == toy.oracle([*TEXT[:8], 7])[-1]
    for n in (-1, 10):
        with pytest.raises(Refused, match=f"a sequence of 9 tokens has no first {n}"):
            sequence.truncate(n)


def test_freed_pages_come_back(model: Model) -> None:
    before = model.info().kv_tokens_free
    for _ in range(50):
        sequence = model.sequence(TEXT)
        fork = sequence.fork()
        fork.truncate(17)
        fork.feed([1])
        sequence.free()
        fork.free()
    assert model.info().kv_tokens_free == before


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_greedy_is_the_first_of_the_most_likely(model: Model) -> None:
    for n in range(1, toy.CONTEXT):
        logits = toy.oracle(TEXT[:n])[-1]
        assert model.sequence(TEXT[:n]).sample() == logits.index(max(logits))


def test_the_same_seed_gives_the_same_text_alone_and_in_company(model: Model) -> None:
    def continue_text(company: int) -> list[int]:
        sequence, said = model.sequence(TEXT[:4]), []
        others = [model.sequence(TEXT[i : i + 3]) for i in range(company)]
        for _ in range(12):
            said.append(sequence.sample(temperature=150, top_k=20, top_p=0.9, seed=11) % toy.POISON)
            model.step([*((other, [5]) for other in others), (sequence, said[-1:])])
        for other in [sequence, *others]:
            other.free()
        return said

    alone = continue_text(0)
    assert continue_text(3) == alone
    assert len(set(alone)) > 4

"""The stories and the model trained on them: the grammar keeps its rules, the model keeps its record."""

from __future__ import annotations

import json
import math
import re
import sys
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

STORIES = Path(__file__).parents[2] / "examples" / "stories"
sys.path.insert(0, str(STORIES))

from grammar import Dice, Story, is_held_out, polish, stories, tell  # noqa: E402
from plots import ASIDES, CLOSINGS, OPENINGS, PLOTS  # noqa: E402
from words import ROLES, SYNONYMS  # noqa: E402

N = 3000
SPEECH = {verb for key in ("answered", "asked", "cried", "whispered") for verb in SYNONYMS[key]}
AFTER_A_QUOTATION = SPEECH | {"said", "thought", "and", "they", "he", "she", "his", "her"}


@cache
def told() -> tuple[Story, ...]:
    """The first stories of the grammar."""
    return tuple(tell(seed) for seed in range(N))


def words(text: str) -> set[str]:
    """The words of a text, punctuation removed."""
    return set(re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text))


def offenders(pattern: str) -> list[str]:
    """What a pattern finds in the stories, with some of its surroundings."""
    found = ((story.text, match) for story in told() for match in re.finditer(pattern, story.text))
    return [text[max(0, match.start() - 30) : match.end() + 30] for text, match in found]


def test_a_seed_always_tells_the_same_story() -> None:
    assert tell(5) == tell(5)
    assert tell(0).text.startswith("It was a rainy day. Rain tapped on the windows.")


def test_every_plot_is_told_and_hardly_any_story_twice() -> None:
    assert {story.plot for story in told()} == set(PLOTS)
    assert len({story.text for story in told()}) == N
    assert sum(story.text.startswith("Once upon a time") for story in told()) > N / 2


def test_the_splits_share_no_story() -> None:
    kept = {story.text for story in islice(stories(held_out=True), 100)}
    train = {story.text for story in islice(stories(held_out=False), 1500)}
    assert (len(kept), len(train)) == (100, 1500)
    assert not kept & train
    assert all(map(is_held_out, kept))
    assert not any(map(is_held_out, train))


def test_every_placeholder_of_every_sentence_has_a_meaning() -> None:
    sentences = [s for beats in ((OPENINGS, ASIDES, CLOSINGS), *PLOTS.values()) for beat in beats for s in beat]
    named = {role for s in sentences for role in re.findall(r"\{(\w+)", s)}
    assert named <= {"hero", "friend", *ROLES, *SYNONYMS}
    assert set(ROLES) | set(SYNONYMS) <= named, "a role that no story mentions"
    assert not offenders(r"[{}]|\(n\)|NamedTuple|\(name=")


@pytest.mark.parametrize(
    ("rule", "breach"),
    [
        ("no double spaces, no space before punctuation", r"  | [.,!?]|\s$|^\s"),
        ("an before a vowel", r"\b[Aa] (?=[aeiouAEIOU]|honest)"),
        ("a before a consonant", r"\b[Aa]n (?![aeiouAEIOU]|honest)"),
        ("a sentence begins with a capital", r"[.!?] [a-z]|\.\" [a-z]"),
        ("no sentence ends twice", r"[.!?,]{2}|[.!?]\"[.!?,]"),
        ("no article twice, no word twice", r"\b(?:a|an|the) (?:a|an|the)\b|\b(\w+) \1\b(?<!had had)"),
    ],
)
def test_the_stories_keep_the_rules_of_writing(rule: str, breach: str) -> None:
    assert not offenders(breach)[:5], rule


def test_quotations_are_closed_and_followed_by_a_speaker() -> None:
    assert all(story.text.count('"') % 2 == 0 for story in told())
    after = {m[1] for story in told() for m in re.finditer(r'[!?,]" ([a-z]+)', story.text)}
    assert after <= AFTER_A_QUOTATION


def test_pronouns_agree_with_the_hero() -> None:
    girls = [s.text for s in told() if " girl named " in s.text.split(".")[0]]
    assert girls
    assert not any(re.search(r"\bHis (name|home|bed)\b", text) for text in girls)


def test_a_colour_stays_what_it_was() -> None:
    for story in (story for story in told() if story.plot == "lost and found"):
        text = re.sub("green door|white house|sky was blue", "", story.text)
        assert len(words(text) & set(ROLES["colour"])) <= 1, text


def test_articles_and_capitals_are_settled_by_what_follows() -> None:
    assert polish("a(n) owl saw a(n) fox. she was a(n) honest fox") == "An owl saw a fox. She was an honest fox"
    assert polish('"Why?" he asked. "So." they left. soon') == '"Why?" he asked. "So." They left. Soon'


def test_surprise_counts_every_draw() -> None:
    dice = Dice(seed=0)
    dice.pick("abcd")
    dice.pick("ab")
    assert dice.nats == pytest.approx(math.log(8))
    assert sum(story.nats for story in told()) / N == pytest.approx(54, abs=1)


@cache
def shipped() -> tuple[Any, Any]:
    """The model of the repository and its tokenizer."""
    import torch
    from evaluate import load

    torch.set_num_threads(1)
    return load(STORIES / "model")


def test_the_tokenizer_gives_any_text_back() -> None:
    _, tokenizer = shipped()
    for text in (told()[0].text, '  two  spaces,\n"Ärger" 42 ✓ '):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_greedy_story_has_only_words_of_the_grammar_and_an_end() -> None:
    model, tokenizer = shipped()
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=400, do_sample=False)[0]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == tokenizer.eos_token_id
    assert len(text.split()) > 80
    assert words(text) <= set().union(*(words(story.text) for story in told())), text
    assert text.count('"') % 2 == 0


def test_the_perplexity_is_the_recorded_one() -> None:
    from evaluate import held_out_sequences, perplexity

    record = json.loads((STORIES / "model" / "metrics.json").read_text())
    model, tokenizer = shipped()
    score = perplexity(model, held_out_sequences(tokenizer, n_stories=24))
    assert score.perplexity == pytest.approx(record["perplexity"], rel=0.04)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]

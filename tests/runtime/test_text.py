"""Text from tokens: the pieces add up to the whole, and no piece ends inside a character."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llmc.runtime import LlmcError
from llmc.runtime.text import TextStream, load_tokenizer
from tests.runtime.stub_artifact import WORDS, tokenizer_json

BYTES = {word: i for i, word in enumerate(WORDS) if word.startswith("<0x")}
E_ACUTE = [BYTES["<0xC3>"], BYTES["<0xA9>"]]
ARROW = [BYTES["<0xE2>"], BYTES["<0x86>"], BYTES["<0x92>"]]
ONCE, UPON = WORDS.index("▁Once"), WORDS.index("▁upon")


def pieces(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*map(stream.push, tokens), stream.flush()]


@pytest.fixture
def llama() -> Tokenizer:
    return load_tokenizer(tokenizer_json(), "stub.so")


@pytest.fixture
def bytewise() -> Tokenizer:
    """GPT-2's manner: every token is a run of bytes."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_text_begins_without_the_space_of_its_first_word(llama: Tokenizer) -> None:
    assert pieces(llama, [1, ONCE, UPON]) == ["", "Once", " upon", ""]


def test_a_continuation_keeps_the_space_before_it(llama: Tokenizer) -> None:
    assert pieces(llama, [UPON], prompt=[1, ONCE]) == [" upon", ""]


def test_a_character_comes_whole(llama: Tokenizer) -> None:
    assert pieces(llama, [*E_ACUTE, *ARROW, ONCE]) == ["", "é", "", "", "→", " Once", ""]


def test_an_unfinished_character_shows_at_the_end(llama: Tokenizer) -> None:
    assert pieces(llama, [ONCE, *ARROW[:2]])[:3] == ["Once", "", ""]
    assert set(pieces(llama, [ONCE, *ARROW[:2]])[3]) == {"\ufffd"}


def test_a_character_begun_in_the_prompt_is_finished(llama: Tokenizer) -> None:
    assert pieces(llama, [ARROW[2], ONCE], prompt=[ONCE, *ARROW[:2]]) == ["→", " Once", ""]


def test_a_character_that_the_prompt_leaves_unfinished_is_no_part_of_the_answer(
    llama: Tokenizer, bytewise: Tokenizer
) -> None:
    assert pieces(llama, [UPON], prompt=[ONCE, *ARROW[:2]]) == [" upon", ""]
    arrow, accent = bytewise.encode("→").ids, bytewise.encode("é").ids
    assert pieces(bytewise, accent, prompt=arrow[:2]) == ["", "é", ""]
    assert pieces(bytewise, accent, prompt=bytewise.encode("\ufffd").ids) == ["", "é", ""]


def test_special_tokens_have_no_text(llama: Tokenizer) -> None:
    assert pieces(llama, [ONCE, 2, UPON]) == ["Once", "", " upon", ""]


def test_pieces_of_any_text_add_up_to_it(bytewise: Tokenizer) -> None:
    text = "Zwölf Boxkämpfer → 猫が好き 🐈‍⬛ \n\tend "
    tokens = bytewise.encode(text).ids
    for cut in range(len(tokens)):
        before = bytewise.decode(tokens[:cut])
        if not before.endswith("\ufffd"):
            assert before + "".join(pieces(bytewise, tokens[cut:], prompt=tokens[:cut])) == text


def test_pieces_of_random_tokens_add_up(bytewise: Tokenizer) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        tokens = [rng.randrange(256) for _ in range(40)]
        assert "".join(pieces(bytewise, tokens)) == bytewise.decode(tokens)


def test_a_limit_of_the_tokenizer_does_not_cut_the_prompt(llama: Tokenizer) -> None:
    assert len(llama.encode("Once upon a time Once upon a time").ids) == 9


def test_a_broken_tokenizer_is_an_error_with_a_place() -> None:
    with pytest.raises(LlmcError, match="the tokenizer cannot be read") as refused:
        load_tokenizer(json.dumps({"model": {}}), "model.so")
    assert refused.value.place == "model.so"

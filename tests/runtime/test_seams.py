"""Tokens of a text and of the pictures in it, together as the tokenizer makes them of both."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.runtime.seams import joined, pieces
from tests.pictured import LINES, N_VOCAB, tokenizer

TOKENS = tokenizer()
ROWS = [N_VOCAB, N_VOCAB + 1]
BEGIN, END = "<start_of_image>", "<end_of_image>"


def together(parts: Sequence[Sequence[int]]) -> list[int]:
    return joined(TOKENS, parts, N_VOCAB)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENS.encode(text, add_special_tokens=False).ids
    return ids


def picture(around: str) -> list[int]:
    return [*ids_of(f"{around}{BEGIN}"), *ROWS, *ids_of(f"{END}{around}")]


def test_what_meets_becomes_the_tokens_of_both() -> None:
    text = ids_of(f"a\n{BEGIN}\nb{BEGIN}c")
    found = together(pieces(text, ids_of(BEGIN)[0], [picture("\n\n"), picture("\n\n")]))
    inside = [*ids_of(BEGIN), *ROWS, *ids_of(END)]
    assert found == [*ids_of(f"a{LINES}"), *inside, *ids_of(f"{LINES}b\n\n"), *inside, *ids_of("\n\nc")]
    assert ids_of(LINES) != ids_of("\n") * 3


def test_pictures_side_by_side_meet_too() -> None:
    found = together(pieces(ids_of(f"\n{BEGIN}{BEGIN}"), ids_of(BEGIN)[0], [picture("\n"), picture("\n\n")]))
    inside = [*ids_of(BEGIN), *ROWS, *ids_of(END)]
    assert found == [*ids_of("\n\n"), *inside, *ids_of(LINES), *inside, *ids_of("\n\n")]


def test_what_does_not_meet_stays() -> None:
    text = ids_of(f"\n\n{BEGIN}\n\n")
    assert together(pieces(text, ids_of(BEGIN)[0], [picture("")])) == [
        *ids_of("\n\n"),
        *picture(""),
        *ids_of("\n\n"),
    ]
    assert together([text]) == text
    assert together(pieces(ids_of("no mark"), ids_of(BEGIN)[0], [])) == ids_of("no mark")


def test_tokens_that_are_not_those_of_their_text_stay() -> None:
    """Half a letter, which no text is; three ends of lines that are one token as a text."""
    half = ids_of("é")[:1]
    assert together([half, ids_of("\n")]) == [*half, *ids_of("\n")]
    three = ids_of("\n") * 3
    assert together([three, ids_of("\n\n")]) == [*three, *ids_of("\n\n")]


def test_numbers_of_rows_are_no_tokens_though_the_tokenizer_has_more_than_the_model() -> None:
    ends = [ids_of("\n"), ids_of("\n\n")]
    assert joined(TOKENS, ends, ends[0][0]) == [*ends[0], *ends[1]]
    assert together(ends) == ids_of(LINES)

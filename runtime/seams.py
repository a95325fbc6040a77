"""Where pieces of a prompt meet that were made into tokens one by one: a text, and what stands for a picture in it.

Between two special tokens a text becomes tokens as a whole.  So what two pieces have there, such as a line's end each,
may be other tokens together than apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from llmc.runtime.info import MOST_IDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def joined(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]], n_ids: int | None = None) -> list[int]:
    """The tokens of all pieces, one behind the other, as the tokenizer makes them of their text in one.

    n_ids: tokens that the model has, where ids behind them are rows'.  A stretch that is not the tokens of its own text
    stays as it is, and so do ids that are none of the tokenizer's.
    """
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    n_tokens = min(tokenizer.get_vocab_size(), n_ids or MOST_IDS)
    found: list[int] = []
    stretch: list[list[int]] = []  # the ordinary tokens that the last pieces have at their ends, each piece's own
    for piece in pieces:
        stretch.append([])
        for token in piece:
            if 0 <= token < n_tokens and token not in special:
                stretch[-1].append(token)
            else:
                found += [*together(tokenizer, stretch), token]
                stretch = [[]]
    return found + together(tokenizer, stretch)


def pieces(ids: Sequence[int], mark: int, others: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """A text's tokens, cut at each `mark`, in whose places the others stand."""
    found, rest = list[Sequence[int]](), iter(others)
    begin = 0
    for at in (at for at, token in enumerate(ids) if token == mark):
        found += [ids[begin:at], next(rest)]
        begin = at + 1
    return [*found, ids[begin:]]


def together(tokenizer: Tokenizer, stretch: Sequence[Sequence[int]]) -> list[int]:
    """The tokens of neighbouring texts, of which those are that have some."""
    parts = [list(part) for part in stretch if part]
    apart = [token for part in parts for token in part]
    if len(parts) < 2:
        return apart
    texts = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    if [encoded(tokenizer, text) for text in texts] != parts:
        return apart
    return encoded(tokenizer, "".join(texts))


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids

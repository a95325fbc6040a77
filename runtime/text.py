"""From token ids to text, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmc.runtime.generation import Generation

CONTEXT_TOKENS = 8
"""Tokens of the prompt decoded along with the first new one: decoders look at what stands before a token."""
PARTIAL = "\ufffd"
"""What decoders write in place of bytes that are no whole character yet."""


def load_tokenizer(json: str, place: str) -> Tokenizer:
    """The tokenizer of an artifact.  Its own template decides which special tokens a prompt begins with."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json)
    except Exception as error:  # the library raises bare Exception
        raise LlmcError(f"the tokenizer cannot be read: {error}", place=place, hint="compile the model again") from None
    tokenizer.no_truncation()  # limits and padding written for training would silently change a prompt
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """The text of tokens as they come: never half a character, spaces as in the whole text.

    Decoders are not additive (a leading space may be dropped, a character may span tokens), so each piece is the
    difference between decoding with and without the newest tokens, after a few that are already out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt)[-CONTEXT_TOKENS:]
        self._start = 0  # tokens before this are forgotten
        self._done = len(self._tokens)  # the text of tokens before this is out

    def push(self, token: int) -> str:
        """The text that is complete with this token, perhaps none."""
        self._tokens.append(token)
        text = self._fresh_text()
        if not text or text.endswith(PARTIAL):
            return ""
        if not self._decode(self._tokens[self._done :]).startswith(PARTIAL):  # else they finish a character
            self._start = self._done
        self._done = len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left when no more tokens come: characters that were never finished show as U+FFFD."""
        text = self._fresh_text()
        self._start = self._done = len(self._tokens)
        return text

    def _fresh_text(self) -> str:
        """A character that the prompt began is of the answer if that finishes it, and of neither if not."""
        before, text = self._decode(self._tokens[self._start : self._done]), self._decode(self._tokens[self._start :])
        return text[len(before if text.startswith(before) else before.rstrip(PARTIAL)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def text_pieces(generation: Generation, stream: TextStream) -> Iterator[str]:
    """The text of a generation as it comes, without the end token's."""
    try:
        for token in generation:
            if generation.stop != "eos" and (piece := stream.push(token)):
                yield piece
        if rest := stream.flush():
            yield rest
    finally:
        generation.close()

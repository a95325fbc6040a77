"""What a server asks of a model's vocabulary: ids of texts, texts of ids, whether a request's tokens exist.

All that is asked of the model is asked at the beginning: later it is its thread's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np

from llmc.runtime.classification import encode, with_types
from llmc.runtime.errors import LlmcError
from llmc.runtime.serve.fields import ApiError, wrong

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmc.runtime.binding import Model
    from llmc.runtime.classification import Classification
    from llmc.runtime.generation import Mask
    from llmc.runtime.serve.requests import Prompt
    from llmc.runtime.serve.wanted import Wanted


class Vocabulary:
    """room: most tokens of a sequence.  most_characters: that these can have.  ends: the tokens that end a text."""

    def __init__(self, model: Model, room: int) -> None:
        self.info, self.room = model.info, room
        self.tokenizer = model.tokenizer if model.has_tokenizer else None
        longest = max(map(len, self.tokenizer.get_vocab(with_added_tokens=True))) if self.tokenizer else 0
        self._added = frozenset(self.tokenizer.get_added_tokens_decoder()) if self.tokenizer else frozenset()
        self.most_characters = room * longest
        self.ends = frozenset(model.manifest.get("model", {}).get("eos") or ())

    def ids_of(self, prompt: Prompt, field: str, special: bool = True) -> tuple[int, ...]:
        """Token ids as `llmc run` makes them.  field: of the request, that has it.  special: with what begins a prompt.
        Raises ApiError: none that can be run."""
        if isinstance(prompt, str) and self.tokenizer and len(prompt) > self.most_characters:  # not looked at for long
            raise self.too_long(f"{len(prompt)} characters > {self.most_characters} maximum", field)
        ids = self.encode(prompt, field, special) if isinstance(prompt, str) else prompt
        if not ids:
            raise wrong(field, "has no tokens")
        self.check_room(len(ids), field)
        self.check_ids(field, ids)
        return tuple(ids)

    def check_room(self, n: int, field: str) -> None:
        """Raise ApiError for a prompt of more tokens than a sequence holds."""
        if n > self.room:
            raise self.too_long(f"{n} tokens > {self.room} maximum", field)

    def too_long(self, what: str, field: str) -> ApiError:
        """In the words of Anthropic's API, and of OpenAI's, by which clients know that they have to send less."""
        fact = f"prompt is too long: {what}; this model's maximum context length is {self.room} tokens"
        return ApiError(400, fact, param=field, code="context_length_exceeded")

    def encode(self, text: str, field: str, special: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            fact = "this model has no tokenizer: give token ids, and ask for 'return_token_ids'"
            raise ApiError(400, fact, param=field, code="no_tokenizer")
        try:
            [encoding] = self.tokenizer.encode_batch([text], add_special_tokens=special)  # others run meanwhile
        except (TypeError, ValueError):  # half a surrogate pair is a string in JSON, but no text
            raise ApiError(400, "the prompt is no valid Unicode", param=field, code="invalid_value") from None
        bos = self.info.bos_token
        return tuple(encoding.ids) or ((bos,) if special and bos >= 0 else ())

    def ids_of_each(
        self, texts: Sequence[tuple[str, ...]], how: Classification, field: str, truncate: bool
    ) -> list[tuple[int, ...]]:
        """Token ids of texts, or pairs, that are given labels.  field: of the request, that has them.  truncate: cut
        those that are too long, of pairs the second text.  Raises ApiError: no tokenizer, or one that is too long."""
        if self.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", param=field, code="no_tokenizer")
        found = []
        for number, parts in enumerate(texts):
            place = f"'{field}' has a text, number {number} from 0, that"
            whole = parts[:-1] if truncate else parts  # a long query would be made into tokens for each document
            if any(len(part) > self.most_characters for part in whole):
                fact = f"{place} has more than {self.most_characters} characters; a sequence holds no more here"
                raise ApiError(400, fact, param=field, code="context_length_exceeded")
            try:
                encoding = encode(self.tokenizer, parts, self.room if truncate else None)
            except (TypeError, ValueError):
                raise ApiError(400, f"{place} is no valid Unicode", param=field, code="invalid_value") from None
            ids = with_types(encoding, how, self.info.n_tokens)
            if not 0 < len(ids) <= self.room:
                advice = "which the first of the two fills" if truncate else "or ask to 'truncate'"
                fact = f"{place} has {len(ids)} tokens; a sequence holds {self.room} here, {advice}"
                raise ApiError(400, fact, param=field, code="context_length_exceeded")
            found.append(tuple(ids))
        return found

    def text_of(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """Of a prompt, as it was given; of ids "" where there is no tokenizer."""
        if isinstance(prompt, str):
            return prompt
        return str(self.tokenizer.decode(list(ids))) if self.tokenizer else ""

    def token_of(self, mark: str) -> int | None:
        """The one token that is this text, if there is one."""
        token = None if self.tokenizer is None else self.tokenizer.token_to_id(mark)
        return token if token is not None and token < self.info.n_vocab else None

    def shown(self, marks: Iterable[str]) -> dict[int, str]:
        """See special_marks."""
        return special_marks(self.tokenizer, marks, self.info.n_vocab) if self.tokenizer else {}

    def added(self, marks: Iterable[str]) -> dict[int, str]:
        """Those of the marks that are tokens which were added to the vocabulary, by id.  In llguidance's eyes such a
        token is no text, whether it is special, as gpt-oss' are, or has a text, as Qwen's <tool_call> does."""
        ids = {self.token_of(mark): mark for mark in marks if mark}
        return {token: mark for token, mark in ids.items() if token is not None and token in self._added}

    def going_on(self, stop_tokens: Set[int]) -> Mask:
        """uint32, as How.allowed: all tokens but those that end a text."""
        allowed = np.ones(32 * -(-self.info.n_vocab // 32), np.bool_)
        allowed[[token for token in self.ends | stop_tokens if 0 <= token < self.info.n_vocab]] = False
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def only(self, token: int) -> Mask:
        """uint32, as How.allowed: this token alone.  Raises ApiError: the artifact is too old for that."""
        try:
            self.info.check_masks("")
        except LlmcError as error:
            raise too_old(error) from None
        allowed = np.zeros(-(-self.info.n_vocab // 32), np.uint32)
        allowed[token // 32] = 1 << token % 32
        return allowed

    def check(self, wanted: Wanted) -> None:
        """Raise ApiError for tokens that do not exist, or what the artifact has no texts or is too old for."""
        if wanted.stops and self.tokenizer is None:
            fact = "this model has no tokenizer, and no text to find strings in: see 'stop_token_ids'"
            raise ApiError(400, fact, param="stop", code="no_tokenizer")
        self.check_ids("logit_bias", dict(wanted.how.logit_bias))
        self.check_ids("stop_token_ids", wanted.stop_tokens)
        try:
            if wanted.min_tokens or not wanted.how.is_plain:
                self.info.check_masks("")
            if not wanted.how.is_plain:
                self.info.check_penalties("")
        except LlmcError as error:
            raise too_old(error) from None

    def check_ids(self, name: str, ids: Iterable[int]) -> None:
        for token in ids:
            if not 0 <= token < self.info.n_ids:
                raise wrong(name, f"has the token {token}; ids go from 0 to {self.info.n_ids - 1}")


def special_marks(tokenizer: Tokenizer, marks: Iterable[str], n_vocab: int) -> dict[int, str]:
    """Those of the marks that are special tokens, which have no text otherwise, by id."""
    ids = {tokenizer.token_to_id(mark): mark for mark in marks if mark}
    known = {token: mark for token, mark in ids.items() if token is not None and token < n_vocab}
    return {token: mark for token, mark in known.items() if not tokenizer.decode([token])}


def too_old(error: LlmcError) -> ApiError:
    """What a client is told where the artifact is."""
    return ApiError(400, f"{error.fact}; {error.hint}", code="unsupported_parameter")

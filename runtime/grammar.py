"""Texts that have to look like something: a JSON schema, a regular expression, one of some choices, a grammar.

A Guide knows a model's vocabulary; a Constraint follows one text and says which tokens may come next.  Both are
llguidance's work (MIT; `pip install 'llmc[serve]'`), which is imported when a Guide is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmc.runtime.errors import LlmcError
from llmc.runtime.follow_schema import followed
from llmc.runtime.generation import Mask
from llmc.runtime.parse_json import parse_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from llmc.runtime.binding import Model

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]
WHITESPACE = r"(?: |\n[ \t]{0,40})"
"""What may stand between the parts of JSON, if anything: a blank, or the start of an indented line, as people write it.
With more, models that like blanks lose themselves in them.  The expression must not match the empty string, of which
llguidance makes grammars that give up."""
NAMING = ("grammar", "lark")
"""Kinds of grammars that may name tokens which are no text."""
IS_TAG = re.compile(r"<[^<>]+>")
MOST_CHARACTERS = 200
"""The most characters that an error repeats of what is wrong with a grammar."""


class GaveUp(LlmcError):
    """A grammar turned out too large to be followed any further."""


@dataclass(frozen=True)
class Grammar:
    """What a whole text must look like.  kind, source: the kind of grammar and its text, as llguidance takes them."""

    kind: Kind
    source: str

    @classmethod
    def of_schema(cls, schema: object) -> Grammar:
        """JSON of this schema (JSON Schema, draft 2020-12, but for some rare keywords), with no more properties than it
        names: see follow_schema.py.  True: any JSON."""
        return cls("json_schema", json.dumps(followed(schema)))

    @classmethod
    def of_regex(cls, pattern: str) -> Grammar:
        """Texts that the expression matches as a whole; in the syntax of Rust's regex, which has no backreferences."""
        return cls("regex", pattern)

    @classmethod
    def of_choice(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts."""
        return cls("choice", json.dumps(list(dict.fromkeys(choices))))

    @classmethod
    def of_lark(cls, rules: str) -> Grammar:
        """Context-free, in llguidance's kind of Lark."""
        return cls("lark", rules)

    @classmethod
    def of_rules(cls, rules: str) -> Grammar:
        """Context-free, in llguidance's kind of Lark or llama.cpp's GBNF, whichever it looks like."""
        return cls("grammar", rules)


class Guide:
    """A model's vocabulary, for grammars over its texts; made once, in about a second."""

    def __init__(self, model: Model) -> None:
        """Raises LlmcError: no tokenizer, an older artifact; ModuleNotFoundError: no llguidance."""
        info = model.info
        self.place, self.n_vocab = str(model.path), info.n_vocab
        info.check_masks(self.place)
        self._known = model.tokenizer
        self._n_tokens = max(self.n_vocab, self._known.get_vocab_size(with_added_tokens=True))
        self._eos = [token for token in model.manifest.get("model", {}).get("eos") or () if model.is_eos(token)]
        try:
            self._named = self._read(self._known.to_str())
        except ValueError as error:
            fact = f"the tokenizer cannot follow a grammar: {in_one_line(str(error))}"
            raise LlmcError(fact, place=self.place) from None

    def _read(self, tokenizer: str) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(tokenizer, n_vocab=self._n_tokens, eos_token=self._eos or None)

    @cached_property
    def _plain(self) -> LLTokenizer:
        """For grammars that name no tokens, of texts with tags in them."""
        plain = with_plain_tags(self._known.to_str())
        return self._named if plain is None else self._read(plain)

    def constraint(self, grammar: Grammar) -> Constraint:
        """For a text at its beginning.  Raises LlmcError for a grammar that is none, or too large."""
        from llguidance import LLMatcher, LLParserLimits, grammar_from

        try:
            if grammar.kind == "json_schema":
                options: Any = {"whitespace_pattern": WHITESPACE}
                text = LLMatcher.grammar_from_json_schema(grammar.source, overrides=options)
            else:
                text = grammar_from(grammar.kind, grammar.source)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        tokenizer = self._named if grammar.kind in NAMING or "<" not in grammar.source else self._plain
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        constraint = Constraint(matcher, tokenizer.vocab_size, self.n_vocab)
        if not matcher.is_error():
            constraint.look()  # most of what a large expression costs is spent here, rather than between two steps
        if matcher.is_error():
            raise self._refusal(matcher.get_error())
        return constraint

    def _refusal(self, words: str) -> LlmcError:
        return LlmcError(f"the grammar cannot be used: {in_one_line(words)}", place=self.place)


class Constraint:
    """One text that follows a grammar: ask what is allowed, then take the token that was chosen."""

    def __init__(self, matcher: LLMatcher, n_tokens: int, n_vocab: int) -> None:
        """n_tokens: how many tokens the matcher knows; the model knows the first n_vocab of them."""
        self._matcher, self._n_tokens, self._n_vocab = matcher, n_tokens, n_vocab
        self._allowed: Mask | None = None

    def copy(self) -> Constraint:
        """For another text at the same place."""
        copied = Constraint(self._matcher.deep_copy(), self._n_tokens, self._n_vocab)
        copied._allowed = self._allowed
        return copied

    def look(self) -> Mask:
        """The tokens that may come next: uint32 [(n_vocab + 31) / 32], see How.allowed; computed once per token."""
        if self._allowed is None:
            words = np.zeros(-(-self._n_tokens // 32), np.uint32)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._allowed = words[: -(-self._n_vocab // 32)]
        return self._allowed

    def allowed(self) -> Mask:
        """The same.  Raises GaveUp when the grammar cannot be followed any more."""
        allowed = self.look()
        if self._matcher.is_error():
            raise GaveUp(f"the grammar gave up: {in_one_line(self._matcher.get_error())}")
        return allowed

    def take(self, token: int) -> None:
        """The next token; one that is not allowed is an error of the next `allowed`."""
        self._matcher.consume_token(token)
        self._allowed = None

    def forced(self, most: int) -> list[int]:
        """Up to so many tokens that must come next: the tokens of the text that must come next."""
        return [token for token in self._matcher.compute_ff_tokens() if token < self._n_vocab][:most]

    def foresee(self, guesses: Sequence[int]) -> tuple[list[int], Mask]:
        """The guesses up to the first one that is not allowed, and what is allowed in the place of each: uint32
        [n, (n_vocab + 31) / 32].  Takes none of them."""
        n = self._matcher.validate_tokens(list(guesses))
        places = np.empty((n, -(-self._n_vocab // 32)), np.uint32)
        before = self._allowed
        for place, guess in zip(places, guesses[:n], strict=True):
            place[:] = self.look()
            self.take(guess)
        self._matcher.rollback(n)
        self._allowed = before
        return list(guesses[:n]), places

    @property
    def is_over(self) -> bool:
        """Whether the text is whole, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def with_plain_tags(tokenizer: str) -> str | None:
    """The JSON of a tokenizer whose added tokens in angle brackets are tokens as others are, but for special ones.
    None: it has none of them, or is of a kind that is left as it is.

    llguidance takes each such token for special, as Gemma's <table> and Qwen's <think>: no text of a grammar can be
    one, and yet where that text has to come it is made of it, and the grammar gives up.
    """
    from tokenizers import pre_tokenizers

    told = parse_json(tokenizer)
    vocabulary, added = told["model"].get("vocab"), told.get("added_tokens") or []
    tags = [token for token in added if not token["special"] and IS_TAG.fullmatch(token["content"])]
    if not tags or not isinstance(vocabulary, dict):
        return None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for token in added:  # all of them: others would be numbered anew
        text = token["content"]
        if token in tags and '"ByteLevel"' in json.dumps(told["decoder"]):
            [(text, _)] = level.pre_tokenize_str(text)
        vocabulary.setdefault(text, token["id"])
    told["added_tokens"] = [token for token in added if token not in tags]
    return json.dumps(told)


def in_one_line(words: str) -> str:
    """An error of llguidance in one line, without the place in its own code, or in the grammar around a schema."""
    words = words.partition("<backtrace>")[0]
    if schema := re.search(r"failed to compile JSON schema: (.*?)(\n *\d+ \| |$)", words, re.DOTALL):
        words = schema[1]
    return " ".join(words.replace("<non-verbose/>", "").split())[:MOST_CHARACTERS]

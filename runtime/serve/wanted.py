"""What requests of every kind say of their texts: how tokens are chosen, what ends a text, what it looks like."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.runtime.generation import How
from llmc.runtime.serve.fields import Fields, is_ids, wrong
from llmc.runtime.serve.formats import FORMAT_FIELDS, Format, read_format

MAX_STOPS, MAX_TOP = 16, 20
MOST_TOKENS = 1 << 31
MOST_NAMED, LARGEST_BIAS, LARGEST_PENALTY = 1024, 100, 2
"""Token ids of a field beside the prompt; the latter two are OpenAI's."""
TEXT_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "repeat_penalty",
    "logit_bias",
    "model",
    "stream",
    *FORMAT_FIELDS,
)
"""Of all requests, but for those whose API has others for the same."""
IGNORED_FIELDS: dict[str, tuple[type, str]] = {
    "user": (str, "a string"),
    "metadata": (dict, "an object"),
    "client_metadata": (dict, "an object"),
    "store": (bool, "true or false"),
    "service_tier": (str, "a string"),
    "safety_identifier": (str, "a string"),
    "prompt_cache_key": (str, "a string"),
    "prompt_cache_options": (dict, "an object"),
    "prompt_cache_retention": (str, "a string"),
    "cache_prompt": (bool, "true or false"),
    "priority": (int, "a whole number"),
    "request_id": (str, "a string"),
}
"""They say who asks and how the request is handled, never what the text should be."""
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "include_stop_str_in_output": ((False,), "a text ends before what stops it"),
    "skip_special_tokens": ((True,), "special tokens have no text"),
    "spaces_between_special_tokens": ((True,), "special tokens have no text"),
    "use_beam_search": ((False,), "texts are drawn"),
    "length_penalty": ((1, 1.0), "texts are drawn"),
    "prompt_logprobs": ((), "ask for 'echo' and 'logprobs' in /v1/completions"),
    "truncate_prompt_tokens": ((), "prompts are not cut"),
    "bad_words": (([],), "see 'logit_bias'"),
    "allowed_token_ids": ((), "see 'structured_outputs'"),
}
"""Of each the values that change nothing, and why there are no others."""


@dataclass(frozen=True)
class Wanted:
    """What requests of every kind say.

    model: the name that was asked for, or that of the model where there was none: an adapter's where it is one.
    max_tokens: None: until the context is full.  min_tokens: before them nothing ends a text.  stops, stop_tokens: what
    ends it beside the model's own end token, and is no part of it.  n: texts for each prompt.  seed: of the first text,
    drawn if the client gave none; the next ones have the numbers behind it.  with_usage: a last event with the counts;
    with_running_usage: each with those so far.
    n_top: None: no probabilities; otherwise those of the text's tokens, and of so many likely ones at each place.
    format: what the texts have to look like.
    """

    model: str
    max_tokens: int | None
    min_tokens: int
    how: How
    stops: tuple[str, ...]
    stop_tokens: frozenset[int]
    n: int
    ignore_eos: bool
    stream: bool
    with_usage: bool
    with_running_usage: bool
    with_ids: bool
    n_top: int | None
    format: Format | None

    def how_of(self, index: int) -> How:
        """How the tokens of the prompt's text number `index` are chosen."""
        return replace(self.how, seed=(self.how.seed + index) % (1 << 64))


def read_wanted(
    fields: Fields,
    model: str,
    max_tokens: int | None,
    *,
    most_texts: int = 1,
    n_top: int | None = None,
    stop: str = "stop",
    formats: Sequence[Format] = (),
) -> Wanted:
    """Raises ApiError.  model: the name that may be asked for.  most_texts: of one prompt.  stop: the field that has
    the stop strings.  formats: what else says what the text has to look like."""
    fields.check_model(model)
    fields.check_types(IGNORED_FIELDS)
    options = Fields(fields.of_type("stream_options", dict, {}, "an object"))
    options.refuse_unknown(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    stream = fields.boolean("stream")
    if fields.get("stream_options") is not None and not stream:
        raise wrong("stream_options", "needs 'stream'")
    return Wanted(
        model=model,
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens", 0, 0, MOST_TOKENS if max_tokens is None else max_tokens),
        how=read_how(fields),
        stops=fields.texts(stop, MAX_STOPS),
        stop_tokens=read_stop_tokens(fields),
        n=fields.integer("n", 1, 1, most_texts),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=stream,
        with_usage=options.boolean("include_usage"),
        with_running_usage=options.boolean("continuous_usage_stats"),
        with_ids=fields.boolean("return_token_ids"),
        n_top=n_top,
        format=read_format(fields, formats),
    )


def read_how(fields: Fields) -> How:
    penalty = f"from {-LARGEST_PENALTY} to {LARGEST_PENALTY}"
    return How(
        temperature=fields.number("temperature", 1.0, lambda value: 0 <= value <= 2, "from 0 to 2"),
        top_k=max(0, fields.integer("top_k", 0, -1, (1 << 31) - 1)),
        top_p=fields.number("top_p", 1.0, lambda value: 0 < value <= 1, "above 0, at most 1"),
        seed=fields.integer("seed", random.getrandbits(32), -(1 << 63), (1 << 64) - 1) % (1 << 64),
        min_p=fields.number("min_p", 0.0, lambda value: 0 <= value <= 1, "from 0 to 1"),
        repetition_penalty=read_repetition(fields),
        presence_penalty=fields.number("presence_penalty", 0.0, is_penalty, penalty),
        frequency_penalty=fields.number("frequency_penalty", 0.0, is_penalty, penalty),
        logit_bias=read_biases(fields),
    )


def is_penalty(value: float) -> bool:
    return -LARGEST_PENALTY <= value <= LARGEST_PENALTY


def read_repetition(fields: Fields) -> float:
    """vLLM's field, or llama.cpp's."""
    name = fields.one_of("repetition_penalty", "repeat_penalty")
    return fields.number(name, 1.0, lambda value: 0 < value <= 100, "above 0, at most 100")


def read_biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    """{"token": bias}, as OpenAI has it: ids are the names of fields."""
    given: dict[str, Any] = fields.of_type("logit_bias", dict, {}, "an object: token ids, as strings, and numbers")
    if len(given) > MOST_NAMED:
        raise wrong("logit_bias", f"has {len(given)} tokens; at most {MOST_NAMED}")
    for name, value in given.items():
        if not re.fullmatch(r"\d{1,9}", name, re.ASCII):
            raise wrong("logit_bias", "must have token ids as the names of its fields")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_BIAS:
            raise wrong("logit_bias", f"must have numbers from {-LARGEST_BIAS} to {LARGEST_BIAS}")
    return tuple({int(name): float(value) for name, value in given.items()}.items())


def read_stop_tokens(fields: Fields) -> frozenset[int]:
    ids: list[Any] = fields.of_type("stop_token_ids", list, [], "a list of token ids")
    if len(ids) > MOST_NAMED or (ids and not is_ids(ids)):
        raise wrong("stop_token_ids", f"must be a list of at most {MOST_NAMED} token ids")
    return frozenset(ids)

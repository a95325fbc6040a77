"""What a client may ask for, checked: the bodies of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

from llmc.runtime.generation import How
from llmc.runtime.serve.fields import Fields, wrong
from llmc.runtime.serve.formats import FORMAT_FIELDS, Format, read_format
from llmc.runtime.serve.tools import Tools, read_calls, read_tools

MAX_STOPS, MAX_TOP = 16, 20
MOST_TOKENS = 1 << 31
COMPLETION_TOKENS = 16
"""OpenAI's default for completions; chat goes on until the context is full."""
MOST_NAMED, LARGEST_BIAS, LARGEST_PENALTY = 1024, 100, 2
"""Token ids of a field beside the prompt; the latter two are OpenAI's."""
HOW_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "n",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "repeat_penalty",
    "logit_bias",
    *FORMAT_FIELDS,
)
CHAT_FIELDS = (
    "messages",
    "max_completion_tokens",
    "chat_template_kwargs",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "reasoning_format",
    "include_reasoning",
)
REPLY_FIELDS = ("model", "stream", "stream_options", "return_token_ids")
IGNORED_FIELDS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "cache_prompt",
    "priority",
    "request_id",
)
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
REFUSED_IN_COMPLETIONS = {
    **REFUSED,
    "add_special_tokens": ((True,), "texts begin as those of llmc run do; give token ids"),
    "suffix": (("",), "texts are continued, not filled in"),
    "best_of": ((1,), "ask for 'n' texts"),
}
REFUSED_IN_CHATS = {
    **REFUSED,
    "add_special_tokens": ((False,), "the template writes them"),
    "add_generation_prompt": ((True,), "an answer is generated"),
    "continue_final_message": ((False,), "see /v1/completions"),
    "functions": (([],), "say 'tools'"),
    "function_call": (("none", "auto"), "say 'tool_choice'"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "answers are not predicted"),
    "verbosity": ((), "the model's template decides; see 'chat_template_kwargs'"),
    "web_search_options": ((), "nothing is searched"),
}


@dataclass(frozen=True)
class Wanted:
    """What both kinds of request say.

    max_tokens: None: until the context is full.  min_tokens: before them nothing ends a text.  stops, stop_tokens: what
    ends it beside the model's own end token, and is no part of it.  n: texts for each prompt.  seed: of the first text,
    drawn if the client gave none; the next ones have the numbers behind it.  with_usage: a last event with the counts;
    with_running_usage: each with those so far.
    n_top: None: no probabilities; otherwise those of the text's tokens, and of so many likely ones at each place.
    format: what the texts have to look like.
    """

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


Prompt = str | tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """/v1/completions: texts or token ids to continue; echo: the answer begins with the prompt."""

    wanted: Wanted
    prompts: tuple[Prompt, ...]
    echo: bool


@dataclass(frozen=True)
class Chat:
    """/v1/chat/completions: messages for the template, and what else it is told.

    effort: how much is to be thought.  splits: what the model thinks before it answers is told from the answer;
    with_thoughts: and shown.
    """

    wanted: Wanted
    messages: tuple[dict[str, Any], ...]
    template_kwargs: dict[str, Any]
    tools: Tools | None
    effort: str | None
    splits: bool
    with_thoughts: bool


def read_completion(body: object, model: str, most_texts: int) -> Completion:
    """Raises ApiError.  model: the name that is served.  most_texts: of one prompt."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_COMPLETIONS)
    also = ("prompt", "echo", "logprobs")
    fields.refuse_unknown({*HOW_FIELDS, *REPLY_FIELDS, *IGNORED_FIELDS, *REFUSED_IN_COMPLETIONS, *also})
    max_tokens = fields.integer("max_tokens", COMPLETION_TOKENS, 0, MOST_TOKENS)
    n_top = None if fields.get("logprobs") is None else fields.integer("logprobs", 0, 0, MAX_TOP)
    wanted = read_wanted(fields, model, most_texts, max_tokens, n_top)
    echo = fields.boolean("echo")
    if echo and wanted.stream and n_top is not None:
        raise wrong("echo", "cannot be streamed with 'logprobs'")
    return Completion(wanted, read_prompts(fields.get("prompt")), echo)


def read_chat(body: object, model: str, most_texts: int) -> Chat:
    """Raises ApiError."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_CHATS)
    fields.refuse_unknown({*HOW_FIELDS, *REPLY_FIELDS, *IGNORED_FIELDS, *REFUSED_IN_CHATS, *CHAT_FIELDS})
    given = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) is not None]
    limits = [fields.integer(name, 1, 1, MOST_TOKENS) for name in given]
    n_top = fields.integer("top_logprobs", 0, 0, MAX_TOP)
    with_probs = fields.boolean("logprobs")
    if n_top and not with_probs:
        raise wrong("top_logprobs", "needs 'logprobs'")
    wanted = read_wanted(fields, model, most_texts, min(limits, default=None), n_top if with_probs else None)
    kwargs: dict[str, Any] = fields.of_type("chat_template_kwargs", dict, {}, "an object")
    tools = read_tools(fields)
    if tools is not None and wanted.format is not None:
        raise wrong(wanted.format.param, "cannot be had together with 'tools'")
    form = fields.of_type("reasoning_format", str, "auto", "a string")
    if form not in ("auto", "deepseek", "none"):
        raise wrong("reasoning_format", "must be 'auto', 'deepseek' or 'none'")
    shows = fields.boolean("include_reasoning", True)
    effort = fields.of_type("reasoning_effort", str, "", "a string") or None
    return Chat(wanted, read_messages(fields.get("messages")), kwargs, tools, effort, form != "none", shows)


def read_wanted(fields: Fields, model: str, most_texts: int, max_tokens: int | None, n_top: int | None) -> Wanted:
    fields.check_model(model)
    options = Fields(fields.of_type("stream_options", dict, {}, "an object"))
    options.refuse_unknown(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    return Wanted(
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens", 0, 0, MOST_TOKENS if max_tokens is None else max_tokens),
        how=read_how(fields),
        stops=fields.texts("stop", MAX_STOPS),
        stop_tokens=read_stop_tokens(fields),
        n=fields.integer("n", 1, 1, most_texts),
        ignore_eos=fields.boolean("ignore_eos"),
        stream=fields.boolean("stream"),
        with_usage=options.boolean("include_usage"),
        with_running_usage=options.boolean("continuous_usage_stats"),
        with_ids=fields.boolean("return_token_ids"),
        n_top=n_top,
        format=read_format(fields),
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


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """A text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and is_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if isinstance(value, list) and value and all(is_ids(one) for one in value):
        return tuple(map(tuple, value))
    raise wrong("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists")


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def read_messages(value: object) -> tuple[dict[str, Any], ...]:
    """Messages with a role and a content that is text; what else they have goes to the template as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise wrong("messages", "must be a list of objects with 'role' and 'content'")
    return tuple(read_message(f"messages[{index}]", message) for index, message in enumerate(value))


def read_message(place: str, message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise wrong(f"{place}.role", "must be a string")
    said = {**message, "content": read_content(f"{place}.content", message.get("content"))}
    if said.get("tool_calls") is not None:
        said["tool_calls"] = read_calls(f"{place}.tool_calls", said["tool_calls"])
    return said


def read_content(place: str, content: object) -> str:
    """A text, or parts of one that are put together."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(place, "must be a text, or a list of parts")
    return "".join(text_of_part(f"{place}[{index}]", part) for index, part in enumerate(content))


def text_of_part(place: str, part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise wrong(place, 'must be {"type": "text", "text": …}: the model reads nothing else')

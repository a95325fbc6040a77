"""What a client may ask for, checked: the bodies of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from llmc.runtime.serve.contents import Content, Piece, content_of, pictures_in
from llmc.runtime.serve.fields import Fields, is_ids, wrong
from llmc.runtime.serve.given_pictures import read_picture_part
from llmc.runtime.serve.tools import MIXED_KINDS, Tools, read_calls, read_tools
from llmc.runtime.serve.wanted import (
    IGNORED_FIELDS,
    MAX_TOP,
    MOST_TOKENS,
    REFUSED,
    TEXT_FIELDS,
    Wanted,
    read_wanted,
)

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; chat goes on until the context is full."""
FIELDS = (
    *TEXT_FIELDS,
    *IGNORED_FIELDS,
    "stop",
    "n",
    "max_tokens",
    "response_format",
    "stream_options",
    "return_token_ids",
)
"""The fields of both kinds of requests."""
BUDGET_FIELDS = ("thinking_token_budget", "thinking_budget_tokens")
"""The field that bounds a thought, in vLLM's name and in llama.cpp's."""
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
    *BUDGET_FIELDS,
)
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
    "verbosity": (("medium",), "the model's template decides; see 'chat_template_kwargs'"),
    "web_search_options": ((), "nothing is searched"),
}

if TYPE_CHECKING:
    from llmc.runtime.pictures import Picture

Prompt = str | tuple[int, ...]
TEXT_PARTS = {"text": "text"}
"""Types of a message's parts, and the field of each that has its text."""
SHOW_PICTURES = ("user", "tool")
"""Who may show pictures."""


@dataclass(frozen=True)
class Completion:
    """/v1/completions: texts or token ids to continue; echo: the answer begins with the prompt."""

    wanted: Wanted
    prompts: tuple[Prompt, ...]
    echo: bool


class Effort(NamedTuple):
    """How much is to be thought.  param: the field that says so; None: templates that do not ask may go without."""

    value: str
    param: str | None


class Budget(NamedTuple):
    """Most tokens of a thought.  param: the field that says so; None: where it cannot be kept it need not be."""

    tokens: int
    param: str | None


@dataclass(frozen=True)
class Chat:
    """Messages for the template, what else it is told, and how the answer is shown.

    tools: that may be called.  thinks: False: nothing is to be thought; None: the template decides.  budget: of the
    thought.  splits: what the model thinks before it answers is told from the answer; with_thoughts: and shown.
    prefix: what the answer begins with, of which no more is said.
    """

    wanted: Wanted
    messages: tuple[dict[str, Any], ...]
    tools: Tools | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    effort: Effort | None = None
    thinks: bool | None = None
    budget: Budget | None = None
    splits: bool = True
    with_thoughts: bool = True
    prefix: str = ""

    def __post_init__(self) -> None:
        """Raises ApiError: a format that cannot be had beside tools."""
        form = self.wanted.format
        if self.tools is not None and form is not None and form.grammar.kind not in MIXED_KINDS:
            raise wrong(form.param, "cannot be had together with 'tools'; a JSON schema can")

    @property
    def pictures(self) -> list[Picture]:
        """All that the messages have, in their order."""
        return pictures_in(self.messages)


def read_completion(body: object, model: str, most_texts: int) -> Completion:
    """Raises ApiError.  model: the name that is served.  most_texts: of one prompt."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_COMPLETIONS)
    fields.refuse_unknown({*FIELDS, *REFUSED_IN_COMPLETIONS, "prompt", "echo", "logprobs"})
    is_endless = fields.get("max_tokens") == -1  # as llama.cpp's server and LM Studio have it
    max_tokens = None if is_endless else fields.integer("max_tokens", COMPLETION_TOKENS, 0, MOST_TOKENS)
    n_top = None if fields.get("logprobs") is None else fields.integer("logprobs", 0, 0, MAX_TOP)
    wanted = read_wanted(fields, model, max_tokens, most_texts=most_texts, n_top=n_top)
    echo = fields.boolean("echo")
    if echo and wanted.stream and n_top is not None:
        raise wrong("echo", "cannot be streamed with 'logprobs'")
    return Completion(wanted, read_prompts(fields.get("prompt")), echo)


def read_chat(body: object, model: str, most_texts: int, takes_pictures: bool = False) -> Chat:
    """Raises ApiError.  takes_pictures: whether the model does."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_CHATS)
    fields.refuse_unknown({*FIELDS, *REFUSED_IN_CHATS, *CHAT_FIELDS})
    given = [name for name in ("max_completion_tokens", "max_tokens") if fields.get(name) not in (None, -1)]
    max_tokens = min((fields.integer(name, 1, 1, MOST_TOKENS) for name in given), default=None)
    n_top = fields.integer("top_logprobs", 0, 0, MAX_TOP)
    with_probs = fields.boolean("logprobs")
    if n_top and not with_probs:
        raise wrong("top_logprobs", "needs 'logprobs'")
    form = fields.of_type("reasoning_format", str, "auto", "a string")
    if form not in ("auto", "deepseek", "none"):
        raise wrong("reasoning_format", "must be 'auto', 'deepseek' or 'none'")
    effort = fields.of_type("reasoning_effort", str, "", "a string")
    return Chat(
        read_wanted(fields, model, max_tokens, most_texts=most_texts, n_top=n_top if with_probs else None),
        read_messages(fields.get("messages"), takes_pictures),
        read_tools(fields),
        fields.of_type("chat_template_kwargs", dict, {}, "an object"),
        Effort(effort, "reasoning_effort") if effort else None,
        budget=read_budget(fields),
        splits=form != "none",
        with_thoughts=fields.boolean("include_reasoning", True),
    )


def read_budget(fields: Fields) -> Budget | None:
    name = fields.one_of(*BUDGET_FIELDS)
    tokens = fields.integer(name, -1, -1, MOST_TOKENS)
    return Budget(tokens, name) if tokens >= 0 else None


def read_prompts(value: object) -> tuple[Prompt, ...]:
    """The prompts: a text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and is_ids(value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if isinstance(value, list) and value and all(is_ids(one) for one in value):
        return tuple(map(tuple, value))
    raise wrong("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists")


def read_messages(value: object, takes_pictures: bool = False) -> tuple[dict[str, Any], ...]:
    """Messages with a role and a content; what else they have goes to the template as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise wrong("messages", "must be a list of objects with 'role' and 'content'")
    return tuple(read_message(f"messages[{i}]", message, takes_pictures) for i, message in enumerate(value))


def read_message(place: str, message: dict[str, Any], takes_pictures: bool = False) -> dict[str, Any]:
    """takes_pictures: the model does, of those who are not the model itself or who directs it."""
    role = message.get("role")
    if not isinstance(role, str):
        raise wrong(f"{place}.role", "must be a string")
    shows = takes_pictures and role in SHOW_PICTURES
    said = {**message, "content": read_content(f"{place}.content", message.get("content"), takes_pictures=shows)}
    if said.get("tool_calls") is not None:
        said["tool_calls"] = read_calls(f"{place}.tool_calls", said["tool_calls"])
    return said


def read_content(
    place: str, content: object, kinds: Mapping[str, str] = TEXT_PARTS, *, takes_pictures: bool = False
) -> Content:
    """A text, or parts that are put together.  kinds: of parts with text, as TEXT_PARTS."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(place, "must be a text, or a list of parts")
    listed = enumerate(content)
    return content_of(read_part(f"{place}[{i}]", part, kinds, takes_pictures=takes_pictures) for i, part in listed)


def read_words(place: str, content: object, kinds: Mapping[str, str] = TEXT_PARTS) -> str:
    """The same of text alone."""
    return str(read_content(place, content, kinds))


def read_part(
    place: str, part: object, kinds: Mapping[str, str] = TEXT_PARTS, *, takes_pictures: bool = False
) -> Piece:
    """The text of a part, or its picture."""
    picture = read_picture_part(place, part) if takes_pictures else None
    return text_of_part(place, part, kinds) if picture is None else picture


def text_of_part(place: str, part: object, kinds: Mapping[str, str] = TEXT_PARTS) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(kinds[kind]) if isinstance(part, dict) and isinstance(kind, str) and kind in kinds else None
    if not isinstance(text, str):
        kind, key = next(iter(kinds.items()))
        raise wrong(place, f'must be {{"type": "{kind}", "{key}": …}}: the model reads nothing else')
    return text

"""What a client may ask for, checked: the body of /v1/responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from llmc.runtime.serve.fields import Fields, is_text, unsupported, wrong
from llmc.runtime.serve.formats import read_typed
from llmc.runtime.serve.namespaces import full_name, spread
from llmc.runtime.serve.requests import (
    BUDGET_FIELDS,
    REFUSED_IN_CHATS,
    SHOW_PICTURES,
    Chat,
    Effort,
    read_budget,
    read_content,
    read_words,
)
from llmc.runtime.serve.stored import Messages
from llmc.runtime.serve.tools import Tools, as_chats_have_it, chosen, read_arguments, read_choice, read_function
from llmc.runtime.serve.turns import BETWEEN, Turns
from llmc.runtime.serve.wanted import IGNORED_FIELDS, MOST_TOKENS, REFUSED, TEXT_FIELDS, Wanted, read_wanted

RESPONSE_FIELDS = (
    "input",
    "instructions",
    "previous_response_id",
    "max_output_tokens",
    "text",
    "reasoning",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "max_tool_calls",
    "include",
    "stop",
    "stream_options",
    "chat_template_kwargs",
    *BUDGET_FIELDS,
)
REFUSED_IN_RESPONSES = {
    **REFUSED,
    "conversation": ((), "conversations are not stored; send it as 'input'"),
    "prompt": ((), "prompts are not stored; say 'instructions' and 'input'"),
    "background": ((False,), "who asks has to wait"),
    "truncation": (("disabled",), "prompts are not cut"),
    "context_management": (([],), "conversations are not made shorter"),
    "moderation": ((), "nothing is moderated"),
    "top_logprobs": ((0,), "see /v1/chat/completions"),
}
REFUSED_IN_TEXT = {"verbosity": REFUSED_IN_CHATS["verbosity"]}
REFUSED_IN_REASONING = {
    "context": (("auto",), "the model's template decides"),
    "mode": (("standard",), "there is one"),
}
AS_GIVEN = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "user",
)
"""Fields that an answer repeats as they were given."""
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""Values of "include" that are accepted, though an answer never has anything of these kinds."""
INPUT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
THOUGHT_PARTS = {"reasoning_text": "text", "summary_text": "text"}


class ResponseRequest(NamedTuple):
    """said: what of the request its answer repeats.  talk: the conversation without instructions."""

    chat: Chat
    said: dict[str, Any]
    talk: Messages


def read_response(
    body: object, model: str, stored: Callable[[str], Messages], takes_pictures: bool = False
) -> ResponseRequest:
    """Raises ApiError.  model: the name that is served.  stored: the conversation that ends with a response, by its
    id.  takes_pictures: whether the model does."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_RESPONSES)
    fields.refuse_unknown({*TEXT_FIELDS, *IGNORED_FIELDS, *REFUSED_IN_RESPONSES, *RESPONSE_FIELDS})
    given = fields.get("max_output_tokens")
    max_tokens = None if given is None else fields.integer("max_output_tokens", 1, 1, MOST_TOKENS)
    fields.integer("max_tool_calls", 1, 0, MOST_TOKENS)  # of tools that run here: there are none
    check_include(fields)
    text, reasoning = fields.within("text"), fields.within("reasoning")
    text.refuse(REFUSED_IN_TEXT)
    text.refuse_unknown(("format", *REFUSED_IN_TEXT))
    reasoning.refuse(REFUSED_IN_REASONING)
    reasoning.refuse_unknown(("effort", "summary", "generate_summary", *REFUSED_IN_REASONING))
    effort = reasoning.of_type("effort", str, "", "a string")
    form = text.of_type("format", dict, {"type": "text"}, "an object")
    tools, talk = read_response_tools(fields), read_input(fields, stored, takes_pictures)
    chat = Chat(
        read_wanted(fields, model, max_tokens, formats=read_typed("text.format", form)),
        behind(fields.of_type("instructions", str, "", "a text"), talk),
        tools,
        fields.of_type("chat_template_kwargs", dict, {}, "an object"),
        Effort(effort, "reasoning.effort") if effort else None,
        budget=read_budget(fields),
    )
    return ResponseRequest(chat, repeated(fields, chat.wanted, form, effort), talk)


def repeated(fields: Fields, wanted: Wanted, form: dict[str, Any], effort: str) -> dict[str, Any]:
    """The fields of the request that its answer repeats, with defaults for those that it left out."""
    for name in ("metadata", "text", "tools", "tool_choice"):
        try:
            json.dumps(fields.get(name), allow_nan=False)
        except ValueError:  # 1e400 is read as what JSON has no word for
            raise wrong(name, "has a number that is too large") from None
    return {
        **{name: fields.get(name) for name in AS_GIVEN},
        "background": False,
        "metadata": fields.get("metadata") or {},
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "reasoning": {"effort": effort or None, "summary": None},
        "service_tier": "default",
        "store": fields.boolean("store", True),
        "temperature": wanted.how.temperature,
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "top_logprobs": 0,
        "top_p": wanted.how.top_p,
        "truncation": "disabled",
    }


def check_include(fields: Fields) -> None:
    for name in fields.of_type("include", list, [], "a list"):
        if name == LOGPROBS:
            raise unsupported("include", f"{LOGPROBS} is not had here; see /v1/chat/completions")
        if name not in INCLUDABLE:
            raise wrong("include", "must be a list of names that OpenAI documents")


def read_response_tools(fields: Fields) -> Tools | None:
    listed = list(spread(fields.of_type("tools", list, [], "a list")))
    for place, tool in listed:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise wrong(place, 'must be {"type": "function", "name": …}: this server has no tools of its own')
    functions = dict(read_function(place, tool) for place, tool in listed)
    mode, names = read_choice(fields.get("tool_choice"))
    shown = [as_chats_have_it(tool) for _, tool in listed]
    return chosen(shown, functions, mode, names, fields.boolean("parallel_tool_calls", True))


def read_input(fields: Fields, stored: Callable[[str], Messages], takes_pictures: bool = False) -> Messages:
    """The messages of a text or of items, behind what was said before."""
    turns, value = Turns(), fields.get("input")
    if previous := fields.of_type("previous_response_id", str, "", "a text"):
        turns.go_on_from(stored(previous))
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items:
        raise wrong("input", "must be a text, or a list of items")
    for index, item in enumerate(items):
        read_item(f"input[{index}]", item, turns, takes_pictures)
    talk = turns.messages
    if not talk:
        raise wrong("input", "has nothing that can be read")
    return talk


def behind(instructions: str, talk: Messages) -> Messages:
    """The messages with the instructions first, as one system message with a system message that begins them."""
    if not instructions:
        return talk
    says_more = talk[0]["role"] == "system"
    words = [instructions, talk[0]["content"]] if says_more else [instructions]
    return {"role": "system", "content": BETWEEN.join(words)}, *talk[says_more:]


def read_item(place: str, item: object, turns: Turns, takes_pictures: bool = False) -> None:
    """One more item.  What it has beside what is read here says how it came to be."""
    if not isinstance(item, dict):
        raise wrong(place, "must be an object")
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise wrong(f"{place}.role", "must be 'user', 'assistant', 'system' or 'developer'")
        if item.get("content") is None:
            raise wrong(f"{place}.content", "is missing")
        shows = takes_pictures and role in SHOW_PICTURES
        turns.say(role, read_content(f"{place}.content", item.get("content"), INPUT_PARTS, takes_pictures=shows))
    elif kind == "function_call":
        name, call_id = read_text(place, item, "name"), read_text(place, item, "call_id")
        arguments = read_arguments(f"{place}.arguments", item.get("arguments"))
        turns.call(call_id, full_name(item.get("namespace"), name), arguments)
    elif kind == "function_call_output":
        call_id = read_text(place, item, "call_id")
        turns.result(
            call_id, read_content(f"{place}.output", item.get("output"), INPUT_PARTS, takes_pictures=takes_pictures)
        )
    elif kind == "reasoning":  # without its text it was another server's
        parts = item.get("content") or item.get("summary")
        if thought := read_words(f"{place}.content", parts, THOUGHT_PARTS):
            turns.think(thought)
    else:
        known = "'message', 'function_call', 'function_call_output' or 'reasoning'"
        raise wrong(f"{place}.type", f"must be {known}: nothing else is read, or stored to be referred to")


def read_text(place: str, item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not is_text(value):
        raise wrong(f"{place}.{name}", "must be a text, and not empty")
    return str(value)

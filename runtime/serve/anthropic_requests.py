"""What a client may ask for, checked: the bodies of Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any

from llmc.runtime.serve.contents import Piece, content_of
from llmc.runtime.serve.fields import ApiError, Fields, is_text, wrong
from llmc.runtime.serve.formats import Format, read_typed
from llmc.runtime.serve.requests import Budget, Chat, Effort, read_content, read_part, read_words, text_of_part
from llmc.runtime.serve.tools import Tools, as_chats_have_it, chosen, read_function
from llmc.runtime.serve.turns import BETWEEN, Turns
from llmc.runtime.serve.wanted import IGNORED_FIELDS, MOST_TOKENS, REFUSED, TEXT_FIELDS, read_wanted

MESSAGE_FIELDS = (
    "messages",
    "system",
    "max_tokens",
    "stop_sequences",
    "thinking",
    "tools",
    "tool_choice",
    "output_config",
    "output_format",
    "chat_template_kwargs",
)
ALSO_IGNORED: dict[str, tuple[type, str]] = {
    "billing_policy": (dict, "an object"),
    "cache_control": (dict, "an object"),
    "diagnostics": (dict, "an object"),
    "fallbacks": (object, "anything"),
    "inference_geo": (str, "a string"),
    "user_profile_id": (str, "a string"),
    "workspace_id": (str, "a string"),
}
REFUSED_IN_MESSAGES: dict[str, tuple[tuple[object, ...], str]] = {
    **REFUSED,
    "compaction": ((), "conversations are not made shorter"),
    "container": ((), "there are no containers"),
    "mcp_servers": (([],), "no servers are asked"),
    "context_management": (
        ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        "conversations are not made shorter",
    ),
    "speed": (("standard",), "there is one"),
}
BILLING = "x-anthropic-billing-header:"
"""Claude Code begins its system prompt with a block that differs from request to request, and is not for the model:
read by it no prompt would begin like the one before."""
NO_THREADS = "thread_unsupported_request"
"""An error at which Anthropic's clients go on without a thread."""
MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


def read_anthropic(body: object, model: str, is_counted: bool = False, takes_pictures: bool = False) -> Chat:
    """Raises ApiError.  model: the name that is served.  is_counted: only the tokens of the prompt are wanted.
    takes_pictures: whether the model does."""
    fields = Fields(body)
    fields.refuse(REFUSED_IN_MESSAGES)
    fields.refuse_unknown(
        {*TEXT_FIELDS, *IGNORED_FIELDS, *ALSO_IGNORED, *REFUSED_IN_MESSAGES, *MESSAGE_FIELDS, "thread"}
    )
    fields.check_types(ALSO_IGNORED)
    if fields.get("thread") is not None:
        fact = "'thread' is not supported: conversations are not stored; send the whole one as 'messages'"
        raise ApiError(400, fact, param="thread", code=NO_THREADS)
    if fields.get("max_tokens") is None and not is_counted:
        raise wrong("max_tokens", "is missing")
    max_tokens = fields.integer("max_tokens", 0, 0, MOST_TOKENS)
    output = fields.within("output_config")
    output.refuse_unknown(("effort", "format"))
    effort = output.of_type("effort", str, "", "a string")
    formats = [*read_output_format(output, "format"), *read_output_format(fields, "output_format")]
    messages, prefix = read_turns(fields, takes_pictures)
    thinks, budget, with_thoughts = read_thinking(fields)
    return Chat(
        read_wanted(fields, model, max_tokens, stop="stop_sequences", formats=formats),
        messages,
        read_anthropic_tools(fields),
        fields.of_type("chat_template_kwargs", dict, {}, "an object"),
        Effort(effort, None) if effort else None,
        thinks=thinks,
        budget=budget,
        with_thoughts=with_thoughts,
        prefix=prefix,
    )


def read_output_format(fields: Fields, name: str) -> list[Format]:
    value = fields.of_type(name, dict, {}, "an object")
    return read_typed(fields.place + name, value) if value else []


def read_thinking(fields: Fields) -> tuple[bool | None, Budget | None, bool]:
    """-> (whether anything is to be thought; None: the template decides, how much, whether it is shown)."""
    thinking = fields.within("thinking")
    if fields.get("thinking") is None:
        return None, None, True
    thinking.refuse_unknown(("type", "budget_tokens", "display"))
    kind, display = thinking.get("type"), thinking.get("display") or "summarized"
    if kind not in ("enabled", "adaptive", "disabled"):
        raise thinking.wrong("type", "must be 'enabled', 'adaptive' or 'disabled'")
    if display not in ("summarized", "omitted"):
        raise thinking.wrong("display", "must be 'summarized' or 'omitted'")
    tokens = thinking.integer("budget_tokens", MOST_TOKENS, 1, MOST_TOKENS)
    budget = Budget(tokens, None) if kind == "enabled" and tokens < MOST_TOKENS else None
    return {"enabled": True, "disabled": False}.get(kind), budget, kind != "disabled" and display != "omitted"


def read_anthropic_tools(fields: Fields) -> Tools | None:
    listed: list[Any] = fields.of_type("tools", list, [], "a list")
    for index, tool in enumerate(listed):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise wrong(
                f"tools[{index}]", 'must be {"name": …, "input_schema": …}: this server has no tools of its own'
            )
    functions = dict(read_function(f"tools[{index}]", tool, "input_schema") for index, tool in enumerate(listed))
    choice = fields.within("tool_choice")
    choice.refuse_unknown(("type", "name", "disable_parallel_tool_use"))
    kind = choice.of_type("type", str, "auto", "a string")
    if kind not in MODES:
        raise choice.wrong("type", "must be 'auto', 'any', 'tool' or 'none'")
    names = [choice.get("name")] if kind == "tool" else None
    shown = [as_chats_have_it(tool, "input_schema") for tool in listed]
    return chosen(shown, functions, MODES[kind], names, not choice.boolean("disable_parallel_tool_use"))


def read_turns(fields: Fields, takes_pictures: bool = False) -> tuple[tuple[dict[str, Any], ...], str]:
    """-> (messages behind what the system says, what the answer begins with: the assistant's last words)."""
    turns, listed = Turns(joins_users=True), fields.get("messages")
    if system := read_system(fields.get("system")):
        turns.say("system", system)
    if not isinstance(listed, list) or not listed:
        raise wrong("messages", "must be a list of objects with 'role' and 'content'")
    for index, message in enumerate(listed):
        read_message(f"messages[{index}]", message, turns, takes_pictures)
    talk = turns.messages
    if not talk:
        raise wrong("messages", "have nothing that can be read")
    if talk[-1]["role"] != "assistant":
        return talk, ""
    if talk[-1].keys() != {"role", "content"}:
        raise wrong(f"messages[{len(listed) - 1}]", "is the assistant's, and more than the beginning of a text")
    return talk[:-1], talk[-1]["content"]


def read_system(system: object) -> str:
    """What the system says: a text, or blocks of text."""
    if system is None or isinstance(system, str):
        return system or ""
    if not isinstance(system, list):
        raise wrong("system", "must be a text, or a list of blocks")
    texts = [text_of_part(f"system[{index}]", block) for index, block in enumerate(system)]
    return BETWEEN.join(text for text in texts if not text.startswith(BILLING))


def read_message(place: str, message: object, turns: Turns, takes_pictures: bool = False) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or role not in ("user", "assistant", "system"):
        raise wrong(f"{place}.role", "must be 'user', 'assistant' or 'system'")
    content, said = message.get("content"), list[Piece]()
    if isinstance(content, str):
        turns.say(role, content)
        return
    if not isinstance(content, list):
        raise wrong(f"{place}.content", "must be a text, or a list of blocks")
    for index, block in enumerate(content):
        where = f"{place}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            if any(said):
                turns.say(role, content_of(said))
            said.clear()
            read_result(where, block, turns, takes_pictures)
        elif role == "assistant" and read_act(where, kind, block, turns):
            continue
        elif role == "assistant":
            turns.say(role, text_of_part(where, block))
        else:
            said.append(read_part(where, block, takes_pictures=takes_pictures and role == "user"))
    if any(said):
        turns.say(role, content_of(said))


def read_act(place: str, kind: object, block: dict[str, Any], turns: Turns) -> bool:
    """Whether it is what the assistant thought or called."""
    if kind == "tool_use":
        name, call_id, arguments = block.get("name"), block.get("id"), block.get("input")
        if not is_text(name) or not is_text(call_id) or not isinstance(arguments, dict):
            raise wrong(place, "must have 'id', 'name' and 'input', which is an object")
        turns.call(str(call_id), str(name), arguments)
    elif kind == "thinking":
        turns.think(read_words(f"{place}.thinking", block.get("thinking")))
    return kind in ("tool_use", "thinking", "redacted_thinking")  # the last one only its maker can read


def read_result(place: str, block: dict[str, Any], turns: Turns, takes_pictures: bool = False) -> None:
    call_id = block.get("tool_use_id")
    if not is_text(call_id):
        raise wrong(f"{place}.tool_use_id", "must be a text, and not empty")
    said = read_content(f"{place}.content", block.get("content"), takes_pictures=takes_pictures)
    turns.result(str(call_id), said)

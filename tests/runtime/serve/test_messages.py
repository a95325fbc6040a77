"""Anthropic's `POST /v1/messages`: the same answers as in a chat, as blocks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.serve.anthropic_requests import read_anthropic
from llmc.runtime.serve.fields import ApiError
from tests.runtime.serve.conftest import Server, named_events_of
from tests.runtime.serve.test_thoughts import CLOSING, THOUGHTLESS
from tests.runtime.serve.test_tools import CHATS
from tests.runtime.serve.test_tools import TOOLS as FUNCTIONS

MESSAGES = "/v1/messages"
TALK = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"messages": TALK, "temperature": 0, "ignore_eos": True, "max_tokens": 40, **THOUGHTLESS}
THINKING = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "logit_bias": {str(CLOSING): 2}}
TOOLS = [
    {"name": "f", "input_schema": FUNCTIONS[0]["function"]["parameters"]},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
CALLING = {"max_tokens": 99, "ignore_eos": False, "tools": TOOLS, "tool_choice": {"type": "any"}}


def answer(server: Server, **changes: Any) -> dict[str, Any]:
    status, said = server.ask("POST", MESSAGES, {**BODY, **changes})
    assert status == 200, said
    return dict(said)


def test_an_answer_is_what_a_chat_says(talking: Server) -> None:
    chat = {**BODY, "logit_bias": THINKING["logit_bias"], "chat_template_kwargs": {"enable_thinking": True}}
    [choice] = talking.ask("POST", CHATS, chat)[1]["choices"]
    said = answer(talking, **THINKING)
    wanted = [
        {"type": "thinking", "thinking": choice["message"]["reasoning_content"], "signature": ""},
        {"type": "text", "text": choice["message"]["content"]},
    ]
    assert (said["content"], said["stop_reason"], said["role"]) == (wanted, "max_tokens", "assistant")
    usage = said["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len("userhi<think>")
    assert (usage["output_tokens"], usage["output_tokens_details"]["thinking_tokens"] > 0) == (40, True)
    hidden = {
        **THINKING,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "chat_template_kwargs": {"think": True},
    }
    assert answer(talking, **hidden)["content"] == wanted[1:]


@pytest.mark.parametrize("changes", [THINKING, CALLING])
def test_a_stream_is_the_answer_in_events(talking: Server, changes: dict[str, Any]) -> None:
    with talking.open("POST", MESSAGES, {**BODY, **changes, "stream": True}) as response:
        start, *events, last, stop = named_events_of(response)
    assert (start["type"], start["message"]["content"], stop) == ("message_start", [], {"type": "message_stop"})
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
        elif event["type"] == "content_block_delta":
            assert event["delta"].pop("type") in ("thinking_delta", "text_delta", "input_json_delta")
            [(name, text)] = event["delta"].items()
            blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + text
    for block in blocks:
        if "partial_json" in block:
            block |= {"input": json.loads(block.pop("partial_json")), "id": None}
    whole = answer(talking, **changes)
    assert blocks == [block | {"id": None} if "id" in block else block for block in whole["content"]]
    assert last["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_call_and_its_result_go_on(talking: Server) -> None:
    said = answer(talking, **{**CALLING, "tool_choice": {"type": "tool", "name": "f"}})
    [call] = said["content"]
    assert (call["name"], call["input"]["n"] in (1, 23), said["stop_reason"]) == ("f", True, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "ok"}
    talk = [*TALK, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    counted = talking.ask("POST", f"{MESSAGES}/count_tokens", {"messages": talk, "tools": TOOLS})
    assert counted == (200, {"input_tokens": len(f"2<tool_call>userhiassistant{call['input']['n'] + 1}toolok")})


def test_why_a_text_has_ended_is_said(talking: Server) -> None:
    text = answer(talking)["content"][0]["text"]
    stop = text[20:24]
    said = answer(talking, stop_sequences=["nowhere", stop])
    assert (said["stop_reason"], said["stop_sequence"]) == ("stop_sequence", stop)
    assert said["content"] == [{"type": "text", "text": text[: text.index(stop)]}]
    assert answer(talking, max_tokens=9999)["stop_reason"] == "model_context_window_exceeded"
    none = answer(talking, max_tokens=0)
    assert (none["stop_reason"], none["content"]) == ("max_tokens", [{"type": "text", "text": ""}])


def test_an_answer_goes_on_from_its_beginning(talking: Server) -> None:
    text = answer(talking)["content"][0]["text"]
    said = answer(talking, messages=[*TALK, {"role": "assistant", "content": text[:9]}], max_tokens=31)
    assert text[:9] + said["content"][0]["text"] == text


def test_an_answer_has_the_format_that_is_wanted(talking: Server) -> None:
    said = answer(talking, output_config={"format": {"type": "json_schema", "schema": TOOLS[0]["input_schema"]}})
    assert (json.loads(said["content"][0]["text"])["n"] in (1, 23), said["stop_reason"]) == (True, "end_turn")


def test_errors_have_anthropics_form(talking: Server) -> None:
    for path, body, status, kind in (
        (MESSAGES, {**BODY, "model": "other"}, 404, "not_found_error"),
        (MESSAGES, {**BODY, "max_tokens": -1}, 400, "invalid_request_error"),
        (f"{MESSAGES}/batches", {}, 404, "not_found_error"),
    ):
        given, said = talking.ask("POST", path, body)
        assert (given, said["type"], said["error"]["type"]) == (status, "error", kind)
        assert said["error"]["message"]
    status, said = talking.ask("POST", MESSAGES, {**BODY, "thread": {"type": "create"}})
    assert (status, said["error"]["details"]["error_code"]) == (400, "thread_unsupported_request")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [3]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [*TALK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[1]",
        ),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"tools": [{"name": "f", "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"container": "x"}, "container"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"stop": "x"}, "stop"),
        ({"metadata": 3}, "metadata"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read_anthropic({**BODY, **changes}, "m")
    assert (error.value.status, error.value.param) == (400, param)
    assert "\n" not in error.value.message

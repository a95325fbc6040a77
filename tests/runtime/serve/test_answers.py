"""Answers taken apart, and conversations put together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.serve.answers import Answer, Blocks
from llmc.runtime.serve.anthropic_replies import MessageReply
from llmc.runtime.serve.anthropic_requests import read_anthropic
from llmc.runtime.serve.calls import CallScanner
from llmc.runtime.serve.fields import ApiError, Fields
from llmc.runtime.serve.job import Ask, Job, Said
from llmc.runtime.serve.known_forms import HERMES
from llmc.runtime.serve.responses_replies import ResponseReply
from llmc.runtime.serve.responses_requests import read_response
from llmc.runtime.serve.stored import Stored
from llmc.runtime.serve.thoughts import THINK
from llmc.runtime.serve.tools import read_tools
from tests.runtime.serve.test_tools import F_TEXT, NOW_TEXT, TOOLS


def blocks(*pieces: str) -> list[tuple[str, str]]:
    """(kind, name or text) of each block; that its events say the same is checked."""
    tools = read_tools(Fields({"tools": TOOLS}))
    assert tools is not None
    row, told, is_open = Blocks(Answer(THINK.scanner(False), CallScanner(tools, HERMES))), dict[int, str](), False
    for at, piece in enumerate(pieces):
        for what, block, text in row.push(piece, at == len(pieces) - 1):
            assert (what == "begin") != is_open
            is_open = what != "end"
            told[block.index] = told.get(block.index, "") + text
    assert not is_open
    assert [told[block.index] for block in row.blocks] == [block.text for block in row.blocks]
    return [(block.kind, block.name or block.text) for block in row.blocks]


CALL, NOW = f"<tool_call>\n{F_TEXT}\n</tool_call>", f"<tool_call>\n{NOW_TEXT}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("yes", [("text", "yes")]),
        ("", [("text", "")]),
        (" \n", [("text", " \n")]),
        ("<think>hm</think>yes", [("thought", "hm"), ("text", "yes")]),
        ("<think>hm", [("thought", "hm"), ("text", "")]),
        (f"<think>hm</think>\n{CALL}\n{NOW}", [("thought", "hm"), ("call", "f"), ("call", "now")]),
        (f"so {CALL}", [("text", "so "), ("call", "f")]),
        (f" {CALL} ", [("call", "f")]),
        (
            f"so {CALL} and {NOW} so on",
            [("text", "so "), ("call", "f"), ("text", "and "), ("call", "now"), ("text", "so on")],
        ),
    ],
)
def test_an_answer_is_a_row_of_blocks(text: str, wanted: list[tuple[str, str]]) -> None:
    assert blocks(text) == wanted
    assert blocks(*text, "") == wanted


CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
TALK = [
    {"role": "system", "content": "be\n\nbrief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "ok"},
    {"role": "user", "content": "and"},
]


def test_items_of_openai_become_messages() -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "brief"}]},
        {"type": "message", "role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}], "id": "msg"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"n": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "ok"}]},
        {"role": "user", "content": "and"},
    ]
    read = read_response({"input": items, "instructions": "be"}, "m", Stored().messages)
    assert list(read.chat.messages) == TALK
    again = [items[at] for at in (0, 1, 0, 2, 2, 5, 2)]
    talk = read_response({"input": again}, "m", Stored().messages).chat.messages
    assert [one["role"] for one in talk] == ["system", "user", "developer", "assistant", "assistant"]


def test_blocks_of_anthropic_become_messages() -> None:
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: 3"},
        {"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "brief"},
    ]
    acts = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"n": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "ok"}]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": acts},
        {"role": "user", "content": [result, {"type": "text", "text": "and"}]},
    ]
    body = {"system": system, "messages": messages, "max_tokens": 9}
    assert list(read_anthropic(body, "m").messages) == TALK
    body["messages"] = [*messages, {"role": "user", "content": "more"}, {"role": "assistant", "content": "Well,"}]
    read = read_anthropic(body, "m")
    assert (read.messages[-1]["content"], read.prefix) == ("and\n\nmore", "Well,")


def test_a_stream_that_fails_ends_with_that() -> None:
    wanted = read_anthropic({"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}, "m").wanted
    replies = ResponseReply("m", {}, Answer()), MessageReply("m", wanted, Answer())
    job = Job(Ask((1,), 9), 9, None, print)
    said = []
    for reply in replies:
        reply.piece(Said(job, "so far"))
        name, data = reply.failure(ApiError(503, "no more")).decode().strip().split("\n")
        said.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {said[-1]['type']}"
    failed, error = said[0]["response"], said[1]["error"]
    assert (said[0]["type"], failed["status"], failed["error"]["message"]) == ("response.failed", "failed", "no more")
    assert [(item["status"], item["content"][0]["text"]) for item in failed["output"]] == [("incomplete", "so far")]
    assert (said[1]["type"], error["type"], error["message"]) == ("error", "overloaded_error", "no more")

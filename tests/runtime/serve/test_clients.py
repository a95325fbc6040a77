"""What the clients of OpenAI's and Anthropic's APIs, and what is built on them, look for in answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmc.runtime.generation import How
from llmc.runtime.serve import generating
from llmc.runtime.serve.answers import Answer
from llmc.runtime.serve.anthropic_replies import MessageReply
from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.job import Ask, Job, Said
from llmc.runtime.serve.replies import Choices, Reply
from llmc.runtime.serve.requests import Effort, read_chat, read_completion
from llmc.runtime.serve.responses_requests import read_response
from llmc.runtime.serve.stored import Stored
from tests.runtime.serve.conftest import Server, events_of, named_events_of
from tests.runtime.serve.test_tools import TOOLS

TALK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True, "temperature": 0}


def test_the_reason_of_a_streams_end_comes_alone(talking: Server) -> None:
    with talking.open("POST", "/v1/chat/completions", {**TALK, "stream": True}) as response:
        *chunks, end, _ = events_of(response)
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert all(chunk["choices"][0]["delta"] and not chunk["choices"][0]["finish_reason"] for chunk in chunks)


def test_who_sends_too_much_is_told_in_words_that_clients_look_for(talking: Server) -> None:
    longest = talking.ask("GET", "/v1/models")[1]["data"][0]["max_model_len"]
    for prompt, n in (([9] * (longest + 1), f"{longest + 1} tokens > {longest}"), ("x" * 9999, "9999 characters")):
        status, said = talking.ask("POST", "/v1/completions", {"prompt": prompt})
        assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
        assert said["error"]["message"].startswith(f"prompt is too long: {n}")
        assert said["error"]["message"].endswith(f"this model's maximum context length is {longest} tokens")


def test_anthropics_clients_learn_of_models_in_their_form(talking: Server) -> None:
    [one] = talking.ask("GET", "/v1/models", anthropic_version="2023-06-01")[1]["data"]
    assert one["max_input_tokens"] == one["max_tokens"] == one["max_model_len"]
    status, said = talking.ask("GET", "/v1/models/other", anthropic_version="2023-06-01")
    assert (status, said["type"], said["error"]["type"]) == (404, "error", "not_found_error")


def test_codex_gets_calls_of_functions_in_groups(talking: Server) -> None:
    group = {"type": "namespace", "name": "team", "tools": [{**tool["function"], "type": "function"} for tool in TOOLS]}
    body: dict[str, Any] = {
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "tools": [group, {"type": "web_search", "external_web_access": False}],
        "reasoning": {"summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "client_metadata": {"thread_id": "x"},
        "store": False,
    }
    with talking.open("POST", "/v1/responses", {**body, "stream": True, "tool_choice": "required"}) as response:
        events = list(named_events_of(response))
    [call] = events[-1]["response"]["output"]
    assert (call["type"], call["namespace"], call["name"] in ("f", "now")) == ("function_call", "team", True)
    assert [one["name"] for one in events if one["type"].endswith("arguments.done")] == [call["name"]]
    talk = [*body["input"], call, {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}]
    _, said, result = read_response({**body, "input": talk}, "m", Stored().messages).chat.messages
    assert [one["function"]["name"] for one in said["tool_calls"]] == [result["name"]] == [f"team.{call['name']}"]


def test_as_many_tokens_as_there_is_room_for_may_be_less_than_none() -> None:
    assert read_chat({**TALK, "max_tokens": -1}, "m", 1).wanted.max_tokens is None
    assert read_chat({**TALK, "max_tokens": -1, "max_completion_tokens": 5}, "m", 1).wanted.max_tokens == 5
    assert read_completion({"prompt": [1], "max_tokens": -1}, "m", 1).wanted.max_tokens is None


def test_no_thought_is_wanted_of_who_shows_none() -> None:
    silent = ChatTemplate("{{ messages }}", {})
    assert silent.variables(Effort("none", "reasoning_effort"), None, {}) == {}
    for template, effort in ((silent, "low"), (ChatTemplate("<think></think>{{ messages }}", {}), "none")):
        with pytest.raises(ApiError, match="does not take it"):
            template.variables(Effort(effort, "reasoning_effort"), None, {})


def test_a_stream_that_waits_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generating, "PULSE_S", 0.01)
    wanted = read_chat(TALK, "m", 1).wanted
    for reply, pulse in (
        (Choices("chat", "m", wanted), b":\n\n"),
        (MessageReply("m", wanted, Answer()), b'event: ping\ndata: {"type":"ping"}\n\n'),
    ):
        assert reply.pulse == pulse
        asyncio.run(asyncio.wait_for(wait_for_two_beats(reply), 9))


async def wait_for_two_beats(reply: Reply) -> None:
    """A text that comes after them; then there are no more."""
    news: asyncio.Queue[Said] = asyncio.Queue()
    job = Job(Ask(prompt=(1,), max_tokens=1, how=How()), 8, None, news.put_nowait)
    n_beats = 0
    async for event in generating.events([job], reply, news):
        n_beats += event == reply.pulse
        if event == reply.pulse and n_beats == 2:
            news.put_nowait(Said(job, "x", "length"))
    n_left = news.qsize()
    await asyncio.sleep(0.03)
    assert news.qsize() == n_left

"""`POST /v1/responses`: the same answers as in a chat, as items."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.responses_requests import read_response
from llmc.runtime.serve.stored import Stored
from tests.runtime.serve.conftest import Server, named_events_of
from tests.runtime.serve.test_thoughts import CLOSING, THOUGHTLESS
from tests.runtime.serve.test_tools import CHATS, TOOLS

RESPONSES = "/v1/responses"
BODY: dict[str, Any] = {"input": "hi", "temperature": 0, "ignore_eos": True, "max_output_tokens": 40, **THOUGHTLESS}
THINKING: dict[str, Any] = {"chat_template_kwargs": {"think": True}, "logit_bias": {str(CLOSING): 2}}
FLAT = [{**tool["function"], "type": "function"} for tool in TOOLS]


def answer(server: Server, **changes: Any) -> dict[str, Any]:
    status, said = server.ask("POST", RESPONSES, {**BODY, **changes})
    assert status == 200, said
    return dict(said)


def stream(server: Server, **changes: Any) -> list[dict[str, Any]]:
    with server.open("POST", RESPONSES, {**BODY, **changes, "stream": True}) as response:
        return list(named_events_of(response))


def without_ids(response: dict[str, Any]) -> Any:
    """And without times, and what depends on who asked before."""
    varying = ("id", "call_id", "created_at", "completed_at", "input_tokens_details")
    return json.loads(json.dumps(response), object_hook=lambda one: {k: v for k, v in one.items() if k not in varying})


def test_an_answer_is_what_a_chat_says(talking: Server) -> None:
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    [choice] = talking.ask("POST", CHATS, {**talk, **THINKING})[1]["choices"]
    said = answer(talking, **THINKING)
    thought, message = said["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": choice["message"]["reasoning_content"]}]
    assert [part["text"] for part in message["content"]] == [choice["message"]["content"]]
    assert (message["role"], message["status"], said["status"]) == ("assistant", "incomplete", "incomplete")
    assert said["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (said["usage"]["output_tokens"], said["usage"]["output_tokens_details"]["reasoning_tokens"] > 0) == (
        40,
        True,
    )
    assert (said["store"], said["text"]["format"], said["tools"]) == (True, {"type": "text"}, [])


@pytest.mark.parametrize(
    "changes", [THINKING, {"max_output_tokens": 99, "tools": FLAT, "tool_choice": "required", "ignore_eos": False}]
)
def test_a_stream_has_typed_events(talking: Server, changes: dict[str, Any]) -> None:
    events = stream(talking, **changes)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert without_ids(last) == without_ids(answer(talking, **changes))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"] == [
        item["id"] for item in done
    ]
    for item in done:
        pieces = [event["delta"] for event in events if event.get("item_id") == item["id"] and "delta" in event]
        assert "".join(pieces) == (item["arguments"] if "arguments" in item else item["content"][0]["text"])


def test_a_call_and_its_result_go_on_as_in_a_chat(talking: Server) -> None:
    changes = {"tools": FLAT, "tool_choice": {"type": "function", "name": "f"}, "max_output_tokens": 99}
    said = answer(talking, **changes, ignore_eos=False)
    [call] = said["output"]
    assert (call["type"], call["name"], said["status"]) == ("function_call", "f", "completed")
    items = [{"role": "user", "content": "hi"}, call]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
    counted = talking.ask("POST", f"{RESPONSES}/input_tokens", {"input": [*items, result], "tools": FLAT})[1]
    n = json.loads(call["arguments"])["n"] + 1
    assert counted["input_tokens"] == len(f"2<tool_call>userhiassistant{n}toolok")


def test_only_tools_that_are_allowed_are_called(talking: Server) -> None:
    named = {"type": "function", "name": "now"}
    changes = {"tools": FLAT, "max_output_tokens": 99, "ignore_eos": False}
    required = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    assert [call["name"] for call in answer(talking, **changes, tool_choice=required)["output"]] == ["now"]
    body = {"input": "x", "tools": FLAT, "tool_choice": {**required, "mode": "auto"}}
    tools = read_response(body, "m", Stored().messages).chat.tools
    assert tools is not None
    assert ([tool["function"]["name"] for tool in tools.tools], list(tools.functions)) == (["now"], ["now"])


def test_an_answer_has_the_format_of_its_text(talking: Server) -> None:
    said = answer(
        talking,
        text={"format": {"type": "json_schema", "name": "x", "schema": FLAT[0]["parameters"]}},
        max_output_tokens=99,
    )
    assert json.loads(said["output"][0]["content"][0]["text"])["n"] in (1, 23)
    assert (said["status"], said["error"]) == ("completed", None)


def test_a_response_goes_on_from_an_earlier_one(talking: Server) -> None:
    """With new instructions, and with the results of calls."""
    calling = {"tools": FLAT, "tool_choice": {"type": "function", "name": "f"}, "ignore_eos": False}
    first = answer(talking, **{**calling, "instructions": "be", "max_output_tokens": 99})
    [call] = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
    changes = {"input": [result], "tools": FLAT, "previous_response_id": first["id"], "instructions": "do"}
    second = stream(talking, **changes)[-1]["response"]
    n = json.loads(call["arguments"])["n"] + 1
    assert second["usage"]["input_tokens"] == len(f"2<tool_call>systemdouserhiassistant{n}toolok")
    assert (second["previous_response_id"], first["previous_response_id"]) == (first["id"], None)
    third = {"input": "x", "previous_response_id": second["id"]}
    said = second["output"][0]["content"][0]["text"]
    counted = talking.ask("POST", f"{RESPONSES}/input_tokens", third)[1]["input_tokens"]
    assert counted == len(f"userhiassistant{n}toolokassistant{said}userx")
    place = f"{RESPONSES}/{second['id']}"
    assert talking.ask("GET", place) == (200, second)
    assert talking.ask("DELETE", place) == (200, {"id": second["id"], "object": "response", "deleted": True})
    assert [talking.ask(method, place)[0] for method in ("GET", "DELETE")] == [404, 404]
    assert talking.ask("POST", RESPONSES, third)[1]["error"]["code"] == "previous_response_not_found"
    forgotten = answer(talking, store=False)
    assert (forgotten["store"], talking.ask("GET", f"{RESPONSES}/{forgotten['id']}")[0]) == (False, 404)


def test_the_latest_responses_are_kept() -> None:
    stored = Stored(most_characters=700)
    for number in range(9):
        stored.keep({"id": str(number)}, ({"role": "user", "content": "x" * 200},))
        assert stored.messages("0")
    with pytest.raises(ApiError, match="no response '5', or no more"):
        stored.messages("5")
    assert [json.loads(stored.response(name))["id"] for name in ("8", "7", "0")] == ["8", "7", "0"]
    assert stored.n_characters <= 700
    for name in ("8", "7", "0"):
        stored.drop(name)
    assert stored.n_characters == 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "reasoning", "summary": []}], "instructions": "x"}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "["}]}, "input[0].arguments"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"store": 1}, "store"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"include": [[]]}, "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"frob": 1}}, "text.frob"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters"),
        ({"tools": FLAT, "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "some", "tools": []}}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tools": FLAT, "guided_regex": "a+"}, "guided_regex"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"metadata": "x"}, "metadata"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        read_response({**BODY, **changes}, "m", Stored().messages)
    assert (error.value.status, error.value.param) == (400, param)
    assert "\n" not in error.value.message

"""`llmc serve` from outside: what clients get, what they are refused, and what happens when they go."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime.binding import Model
from tests.runtime.serve.conftest import KEY, ORIGIN, Server, events_of, serving, write_served_stub
from tests.runtime.stub_artifact import EOS, N_CONTEXT, N_VOCAB, characters_json

CHATS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA_PARAM = "response_format.json_schema.schema"
GOOD: dict[str, Any] = {"prompt": [1], "max_tokens": 1}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def model(stub: Path) -> Iterator[Model]:
    with llmc.load(stub) as model:
        yield model


def text_after(model: Model, prompt: str | list[int], n: int) -> str:
    return "".join(model.generate(prompt, n, ignore_eos=True))


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_a_text_is_what_llmc_run_says(server: Server, model: Model) -> None:
    said = server.complete(prompt="Once upon", max_tokens=9, return_token_ids=True)
    tokens = model.tokens("Once upon", 9, ignore_eos=True)
    [choice] = said["choices"]
    assert choice["token_ids"] == tokens
    assert choice["text"] == text_after(model, "Once upon", 9)
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert (said["object"], said["model"]) == ("text_completion", "stub")
    usage = said["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 9, 12)


def test_clients_at_once_get_what_each_gets_alone(server: Server, model: Model) -> None:
    prompts = [[3 + client, *range(4, 4 + 3 * client)] for client in range(10)]

    def ask(prompt: list[int]) -> Any:
        said = server.complete(prompt=prompt, max_tokens=14, return_token_ids=True)
        return said["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == [model.tokens(prompt, 14, ignore_eos=True) for prompt in prompts]


def test_a_stream_is_the_text_in_pieces(server: Server, model: Model) -> None:
    body = {"prompt": [5, 6], "max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}
    with server.open("POST", COMPLETIONS, {**body, "stream_options": {"include_usage": True}}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events_of(response)
    assert done == "[DONE]"
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert len(pieces) > 6
    assert "".join(pieces) == text_after(model, [5, 6], 12)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
    assert {chunk["usage"] for chunk in chunks} == {None}
    with server.open("POST", COMPLETIONS, {**body, "stream_options": {"continuous_usage_stats": True}}) as response:
        *running, _ = events_of(response)
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert (sorted(counts), counts[-1]) == (counts, 12)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_messages_become_a_prompt_by_the_models_template(server: Server, model: Model) -> None:
    parts = [{"type": "text", "text": "Once "}, {"type": "text", "text": " upon "}]
    messages = [{"role": "user", "content": parts}]
    body = {"messages": messages, "max_completion_tokens": 7, "temperature": 0, "ignore_eos": True}
    prompt = model.encode("<s> Once  upon a.", special=False)
    wanted = "".join(model.generate(prompt, 7, ignore_eos=True))
    status, said = server.ask("POST", CHATS, {**body, "chat_template_kwargs": {"also": "."}})
    assert status == 200
    assert said["object"] == "chat.completion"
    assert said["choices"][0]["message"] == {"role": "assistant", "content": wanted, "refusal": None}
    with server.open("POST", CHATS, {**body, "chat_template_kwargs": {"also": "."}, "stream": True}) as response:
        first, *chunks, _ = events_of(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted


def test_a_template_may_refuse(server: Server) -> None:
    status, said = server.ask("POST", CHATS, {"messages": [{"role": "judge", "content": "x"}]})
    assert (status, said["error"]["param"]) == (400, "messages")
    assert "no judge" in said["error"]["message"]


def test_stop_strings_end_a_text_and_are_no_part_of_it(server: Server, model: Model) -> None:
    text = text_after(model, [9], 20)
    stop = text[11:14]
    [choice] = server.complete(prompt=[9], max_tokens=20, stop=["nowhere", stop])["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_several_prompts_and_texts_come_in_order(server: Server, model: Model) -> None:
    said = server.complete(prompt=["Once", "time"], n=2, max_tokens=5, temperature=1, seed=3, echo=True)
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3]
    wanted = [
        prompt + "".join(model.generate(prompt, 5, temperature=1, seed=seed, ignore_eos=True))
        for prompt in ("Once", "time")
        for seed in (3, 4)
    ]
    assert [choice["text"] for choice in said["choices"]] == wanted
    assert said["usage"]["prompt_tokens"] == 4


def test_probabilities_come_as_openai_gives_them(server: Server) -> None:
    [choice] = server.complete(prompt="Once upon", max_tokens=4, logprobs=2, echo=True)["choices"]
    said = choice["logprobs"]
    assert [len(said[name]) for name in said] == [7] * 4  # <s>, two words, what was generated
    assert (said["token_logprobs"][0], said["top_logprobs"][0]) == (None, None)
    assert said["token_logprobs"][4:] == [max(top.values()) for top in said["top_logprobs"][4:]]
    assert said["text_offset"] == [sum(map(len, said["tokens"][:i])) for i in range(7)]
    silent = server.complete(prompt=[3, 4], max_tokens=0, logprobs=0, echo=True)
    assert len(silent["choices"][0]["logprobs"]["tokens"]) == 2
    assert silent["usage"]["completion_tokens"] == 0

    body = {**TALK, "max_tokens": 5, "logprobs": True, "top_logprobs": 3, "temperature": 0, "ignore_eos": True}
    whole = server.ask("POST", CHATS, body)[1]["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"][0]["logprob"] for one in whole] == [one["logprob"] for one in whole]
    assert [len(one["top_logprobs"]) for one in whole] == [3] * 5
    with server.open("POST", CHATS, {**body, "stream": True}) as response:
        _, *chunks, _, _ = events_of(response)
    assert [one for chunk in chunks for one in chunk["choices"][0]["logprobs"]["content"]] == whole


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def json_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a model that can say JSON."""
    path = write_served_stub(tmp_path_factory.mktemp("json") / "a.so", tokenizer=characters_json())
    with serving(path) as server:
        yield server


def test_answers_have_the_format_that_is_wanted(json_server: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body = {**TALK, "temperature": 1, "seed": 3, "n": 3, "response_format": wanted}
    status, said = json_server.ask("POST", CHATS, body)
    assert status == 200, said
    for choice in said["choices"]:
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]).keys() == {"n", "ok"}
    with json_server.open("POST", CHATS, {**body, "n": 1, "stream": True}) as response:
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in list(events_of(response))[:-1]]
    assert "".join(pieces) == said["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"structured_outputs": {"json": {"enum": [12, 34]}}}, "12|34"),
        ({"structured_outputs": {"choice": ["a", "b"]}, "response_format": {"type": "text"}}, "a|b"),
        ({"grammar": 'root ::= "x" [yz]'}, "xy|xz"),
        ({"guided_json": json.dumps(SCHEMA), "prompt": [[4], [9]]}, r'\{"n":[0-9]+,"ok":(true|false)\}'),
        ({"response_format": {"type": "json_object"}, "max_tokens": 5}, r"\{.*"),
    ],
)
def test_completions_take_vllms_and_llama_cpps_fields(json_server: Server, how: dict[str, Any], pattern: str) -> None:
    for choice in json_server.complete(**{"prompt": [9], "max_tokens": 40, **how})["choices"]:
        assert re.fullmatch(pattern, choice["text"], re.DOTALL), choice
        assert choice["finish_reason"] == "stop" or "max_tokens" in how


def test_without_llguidance_only_formats_are_refused(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llguidance.py").write_text("raise ModuleNotFoundError(name='llguidance')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serving(stub) as server:
        status, said = server.ask("POST", COMPLETIONS, {**GOOD, "guided_regex": "a"})
        assert (status, said["error"]["code"]) == (400, "unsupported_parameter")
        assert said["error"]["message"] == (
            "'guided_regex' needs the Python package llguidance, which the server does not have"
        )
        assert server.complete(**GOOD)["choices"]


def test_what_is_served_is_listed(server: Server) -> None:
    status, said = server.ask("GET", "/v1/models")
    assert (status, [one["id"] for one in said["data"]]) == (200, ["stub"])
    assert server.ask("GET", "/v1/models/stub")[1] == said["data"][0]
    assert server.ask("GET", "/v1/models/other")[0] == 404
    assert server.ask("GET", "/health") == (200, {"status": "ok"})


def test_texts_become_tokens_and_tokens_texts(server: Server, model: Model) -> None:
    ids = model.encode("Once upon")
    said = {"count": 3, "max_model_len": N_CONTEXT, "tokens": ids, "token_strs": None}
    assert server.ask("POST", "/tokenize", {"prompt": "Once upon"}) == (200, said)
    shown = server.ask("POST", "/tokenize", {"prompt": "Once upon", "return_token_strs": True})[1]["token_strs"]
    assert shown == ["<s>", "▁Once", "▁upon"]
    assert server.ask("POST", "/tokenize", {"content": "Once"})[1]["tokens"] == model.encode("Once", special=False)
    chat = server.ask("POST", "/tokenize", TALK)[1]["tokens"]
    assert chat == model.encode("<s> x a", special=False)
    assert server.ask("POST", "/detokenize", {"tokens": ids[1:]}) == (
        200,
        {"prompt": "Once upon", "content": "Once upon"},
    )
    wrong: Any = ({"tokens": [N_VOCAB]}, {"tokens": "x"}, {"tokens": [1.5]}, {}, {"tokens": [1], "model": "other"})
    assert [server.ask("POST", "/detokenize", body)[0] for body in wrong] == [400, 400, 400, 400, 404]
    wrong = ({}, {"prompt": 3}, {"prompt": "\ud800"}, {"messages": []}, {"prompt": "x", "messages": [{}]})
    assert [server.ask("POST", "/tokenize", body)[0] for body in wrong] == [400] * 5


def test_what_is_not_served_says_what_is(server: Server) -> None:
    status, said = server.ask("POST", "/v1/images", {"input": "x"})
    assert (status, "this server has /v1/completions" in said["error"]["message"]) == (404, True)


def test_web_pages_may_ask_from_where_they_are_allowed_to(slow_server: Server) -> None:
    ask = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://other", None)):
        with slow_server.open("OPTIONS", CHATS, origin=origin, **ask) as response:
            assert response.headers["access-control-allow-origin"] == allowed
        with slow_server.open("GET", "/v1/models", origin=origin) as response:
            assert (response.status, response.headers["access-control-allow-origin"]) == (200, allowed)


def test_metrics_count(server: Server) -> None:
    before = server.metric("generated_tokens_total")
    server.complete(prompt=[7], max_tokens=4)
    assert server.metric("generated_tokens_total") == before + 4
    assert (server.metric("running"), server.metric("waiting")) == (0, 0)
    assert server.metric("first_token_seconds_count") > 0


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, b"{", 400, None),
        (COMPLETIONS, b"[" * 100_000, 400, None),
        (COMPLETIONS, [1], 400, None),
        (COMPLETIONS, b'{"prompt": [1' + b",1" * 200_000 + b"]}", 400, "prompt"),  # large enough for a thread
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": []}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": [1, "a"]}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": [True]}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": [N_VOCAB]}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": [1] * (N_CONTEXT + 1)}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": "\ud800"}, 400, "prompt"),
        (COMPLETIONS, {**GOOD, "prompt": "a" * 8_000_000}, 400, "prompt"),  # would be tokens for half a minute
        ("/tokenize", {"prompt": "a" * 600_000}, 400, "prompt"),
        ("/detokenize", {"tokens": [3] * 200_000}, 400, "tokens"),
        (COMPLETIONS, {**GOOD, "prompt": [[1]] * 100}, 400, None),
        (COMPLETIONS, {**GOOD, "prompt": [[N_VOCAB]] * 100}, 400, None),  # counted before any is looked at
        (COMPLETIONS, {**GOOD, "max_tokens": -2}, 400, "max_tokens"),
        (COMPLETIONS, {**GOOD, "max_tokens": "9"}, 400, "max_tokens"),
        (COMPLETIONS, {**GOOD, "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {**GOOD, "temperature": float("nan")}, 400, None),
        (COMPLETIONS, b'{"prompt": [1], "temperature": 1e400}', 400, "temperature"),
        (COMPLETIONS, b'{"prompt": [1], "prompt": [1]}', 400, None),
        (COMPLETIONS, {**GOOD, "top_p": 0}, 400, "top_p"),
        (COMPLETIONS, {**GOOD, "top_k": 1.5}, 400, "top_k"),
        (COMPLETIONS, {**GOOD, "seed": 1 << 64}, 400, "seed"),
        (COMPLETIONS, {**GOOD, "n": 9}, 400, "n"),
        (COMPLETIONS, {**GOOD, "stop": ""}, 400, "stop"),
        (COMPLETIONS, {**GOOD, "stream": 1}, 400, "stream"),
        (COMPLETIONS, {**GOOD, "stream_options": {"frob": 1}}, 400, "frob"),
        (COMPLETIONS, {**GOOD, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        (COMPLETIONS, {**GOOD, "user": 3}, 400, "user"),
        (COMPLETIONS, {**GOOD, "best_of": 2}, 400, "best_of"),
        (COMPLETIONS, {**GOOD, "logprobs": 21}, 400, "logprobs"),
        (COMPLETIONS, {**GOOD, "logprobs": 1, "echo": True, "stream": True}, 400, "echo"),
        (CHATS, {**TALK, "top_logprobs": 1}, 400, "top_logprobs"),
        (COMPLETIONS, {**GOOD, "presence_penalty": 2.5}, 400, "presence_penalty"),
        (COMPLETIONS, {**GOOD, "frequency_penalty": "1"}, 400, "frequency_penalty"),
        (COMPLETIONS, {**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty"),
        (COMPLETIONS, {**GOOD, "repeat_penalty": 10**400}, 400, "repeat_penalty"),
        (COMPLETIONS, {**GOOD, "repeat_penalty": 1.1, "repetition_penalty": 1.1}, 400, "repeat_penalty"),
        (COMPLETIONS, {**GOOD, "min_p": 1.5}, 400, "min_p"),
        (COMPLETIONS, {**GOOD, "min_tokens": 2}, 400, "min_tokens"),
        (COMPLETIONS, {**GOOD, "stop_token_ids": [True]}, 400, "stop_token_ids"),
        (COMPLETIONS, {**GOOD, "stop_token_ids": [N_VOCAB]}, 400, "stop_token_ids"),
        (COMPLETIONS, {**GOOD, "logit_bias": [1]}, 400, "logit_bias"),
        (COMPLETIONS, {**GOOD, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        (COMPLETIONS, {**GOOD, "logit_bias": {"1": 101}}, 400, "logit_bias"),
        (COMPLETIONS, {**GOOD, "logit_bias": {"64": 1}}, 400, "logit_bias"),
        (COMPLETIONS, {**GOOD, "logit_bias": {str(i): 0 for i in range(2000)}}, 400, "logit_bias"),
        (COMPLETIONS, {**GOOD, "frob": 1}, 400, "frob"),
        (COMPLETIONS, {**GOOD, "model": "gpt-4"}, 404, "model"),
        (CHATS, {}, 400, "messages"),
        (CHATS, {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
        (CHATS, {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
        (CHATS, {**TALK, "max_tokens": 0}, 400, "max_tokens"),
        (CHATS, {**TALK, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        (CHATS, {**TALK, "response_format": {"type": "xml"}}, 400, "response_format.type"),
        (CHATS, {**TALK, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (CHATS, {**TALK, "response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, 400, SCHEMA_PARAM),
        (COMPLETIONS, {**GOOD, "guided_json": {"type": "strin"}}, 400, "guided_json"),
        (COMPLETIONS, {**GOOD, "guided_json": "{"}, 400, "guided_json"),
        (COMPLETIONS, {**GOOD, "guided_regex": "("}, 400, "guided_regex"),
        (COMPLETIONS, {**GOOD, "guided_choice": []}, 400, "guided_choice"),
        (COMPLETIONS, {**GOOD, "guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
        (COMPLETIONS, {**GOOD, "structured_outputs": {"xml": 1}}, 400, "structured_outputs.xml"),
        ("/v1/nothing", GOOD, 404, None),
        ("/health", GOOD, 405, None),
    ],
)
def test_what_is_wrong_is_named(server: Server, path: str, body: object, status: int, param: str | None) -> None:
    given, said = server.ask("POST", path, body)
    assert (given, said["error"]["param"]) == (status, param), said
    assert said["error"]["type"] == "invalid_request_error"
    assert said["error"]["message"]


def test_penalties_and_biases_reach_the_runtime(server: Server, model: Model) -> None:
    body = {"prompt": [5, 6], "max_tokens": 20, "return_token_ids": True}
    [choice] = server.complete(**body, presence_penalty=2, logit_bias={"9": 4.5, "10": -100})["choices"]
    how: dict[str, Any] = {"presence_penalty": 2.0, "logit_bias": {9: 4.5, 10: -100.0}}
    assert choice["token_ids"] == model.tokens([5, 6], 20, ignore_eos=True, **how)
    assert choice["token_ids"] != model.tokens([5, 6], 20, ignore_eos=True)


def test_tokens_that_stop_a_text_do_so_once_it_is_long_enough(server: Server, model: Model) -> None:
    tokens = model.tokens([5, 6], 20, ignore_eos=True)
    ends, body = tokens[3], {"prompt": [5, 6], "max_tokens": 20, "return_token_ids": True}
    [choice] = server.complete(**body, stop_token_ids=[ends])["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == (tokens[: tokens.index(ends) + 1], "stop")
    assert choice["text"] == model.decode(choice["token_ids"][:-1], after=[5, 6])
    [choice] = server.complete(**body, stop_token_ids=[ends], min_tokens=20)["choices"]
    assert (len(choice["token_ids"]), ends in choice["token_ids"]) == (20, False)
    text = text_after(model, [5, 6], 20)
    [choice] = server.complete(**body, stop=text[:4], min_tokens=20)["choices"]
    assert choice["text"] == text
    [choice] = server.complete(**body, ignore_eos=False, logit_bias={str(EOS): 100}, min_tokens=5)["choices"]
    assert (len(choice["token_ids"]), choice["token_ids"][-1], choice["finish_reason"]) == (6, EOS, "stop")


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    harmless = {
        "user": "me",
        "logit_bias": {},
        "presence_penalty": 0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
        "best_of": 1,
        "n": None,
    }
    assert len(server.complete(**GOOD, **harmless)["choices"]) == 1


def test_bodies_of_any_size_or_type_are_not_taken(server: Server) -> None:
    status, said = server.ask("POST", COMPLETIONS, b'{"prompt": "' + b"a" * (24 << 20))
    assert (status, said["error"]["message"]) == (413, "the body of the request is larger than 8 MiB")
    assert server.ask("POST", COMPLETIONS, GOOD, content_type="text/plain")[0] == 415
    status, said = server.ask("POST", COMPLETIONS, GOOD, content_encoding="gzip")
    assert (status, said["error"]["message"]) == (415, "the body of the request is encoded as gzip; send it as it is")


def test_a_key_is_asked_for(slow_server: Server) -> None:
    assert slow_server.ask("POST", COMPLETIONS, GOOD, authorization="Bearer other")[0] == 401
    status, said = slow_server.ask("GET", "/v1/models", authorization="")
    assert (status, said["error"]["code"]) == (401, "invalid_api_key")
    assert slow_server.ask("GET", "/health", authorization="")[0] == 200
    assert slow_server.ask("GET", "/v1/models", authorization=f"Bearer {KEY}")[0] == 200
    assert slow_server.ask("GET", "/v1/models", authorization=f"bearer {KEY}")[0] == 200
    assert slow_server.ask("GET", "/v1/models", authorization="", x_api_key=KEY)[0] == 200
    status, said = slow_server.ask("POST", "/v1/messages", GOOD, authorization="", x_api_key="other")
    assert (status, said["error"]["type"]) == (401, "authentication_error")


LONG: dict[str, Any] = {"prompt": [1], "max_tokens": 45, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_makes_room_at_once(slow_server: Server, stream: bool) -> None:
    before = slow_server.metric("cancelled_total")
    host, port = slow_server.address.split(":")
    with socket.create_connection((host, int(port))) as client:
        body = json.dumps({**LONG, "stream": stream})
        head = f"POST {COMPLETIONS} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}"
        lines = (*head, "Content-Type: application/json", f"Content-Length: {len(body)}", "", body)
        client.sendall("\r\n".join(lines).encode())
        wait_until(lambda: slow_server.metric("running") == 1)
    wait_until(lambda: slow_server.metric("running") == 0)
    assert slow_server.metric("cancelled_total") == before + 1


def test_a_full_queue_says_when_to_come_again(slow_server: Server) -> None:
    def stream(**body: Any) -> Any:
        return slow_server.open("POST", COMPLETIONS, {**LONG, "stream": True, **body})

    with stream() as first, stream(max_tokens=2) as second:
        wait_until(lambda: slow_server.metric("waiting") == 1)
        with stream() as third:
            assert (third.status, third.headers["retry-after"]) == (503, "1")
        assert [list(events_of(response))[-1] for response in (first, second)] == ["[DONE]"] * 2


def test_ctrl_c_ends_texts_in_bounded_time(slow_stub: Path) -> None:
    """That the exit code is 0 is checked by `serving`."""
    with serving(slow_stub, "--max-batch", 1, "--grace", 0.2) as server:
        with server.open("POST", COMPLETIONS, {**LONG, "stream": True}) as response:
            events = events_of(response)
            next(events)
            server.process.send_signal(2)
            assert list(events)[-1]["error"]["code"] == "shutting_down"
        server.process.wait(timeout=10)


def test_a_model_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    path = write_served_stub(tmp_path / "a.so", tokenizer=None)
    with serving(path, "--name", "ids", "--kv-tokens", 40) as server:
        said = server.complete(prompt=[1, 2], max_tokens=3, return_token_ids=True, model="ids")
        [choice] = said["choices"]
        assert (choice["text"], len(choice["token_ids"])) == ("", 3)
        body = {"prompt": [1, 2], "max_tokens": 3, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        with server.open("POST", COMPLETIONS, {**body, "stream": True}) as response:
            *chunks, _ = events_of(response)
        assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token] for token in choice["token_ids"]]
        probs = server.complete(prompt=[1, 2], max_tokens=3, logprobs=1, echo=True)["choices"][0]["logprobs"]
        assert probs["tokens"] == [f"token_id:{token}" for token in (1, 2, *choice["token_ids"])]
        for wrong in ({"prompt": "x"}, {"prompt": [1], "stop": "x"}):
            assert server.ask("POST", COMPLETIONS, wrong)[1]["error"]["code"] == "no_tokenizer"
        assert server.ask("POST", CHATS, TALK)[1]["error"]["code"] == "no_chat_template"
        assert server.metric("kv_pages") == 40

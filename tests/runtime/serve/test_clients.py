"""What the clients of OpenAI's and Anthropic's APIs, and what is built on them, look for in answers."""

from __future__ import annotations

from tests.runtime.serve.conftest import Server, events_of

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

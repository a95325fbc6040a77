"""Pictures in requests: each API's form of them, what is refused, and how they are read beside other texts."""

from __future__ import annotations

import base64
import io
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import pytest
from PIL import Image

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.pictures import Picture
from llmc.runtime.serve.engine import Closing
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.given_pictures import MOST_PICTURES, check_pictures, read_picture_part
from llmc.runtime.serve.requests import read_chat
from tests.pictured import noise
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_pictured
from tests.runtime.serve.conftest import Server, serving
from tests.runtime.serve.served import Served, prompt
from tests.runtime.toy_given import TILE_ROWS
from tests.runtime.toy_pictured import answer

CHATS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
RED, BLUE = noise(4, 2, seed=1), noise(4, 2, seed=2)
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def data_of(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def url_of(picture: Image.Image) -> str:
    return f"data:image/png;base64,{data_of(picture)}"


def in_chats(picture: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(picture), "detail": "low"}}


def in_responses(picture: Image.Image) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url_of(picture), "detail": "auto"}


def in_messages(picture: Image.Image) -> dict[str, Any]:
    lines = "\n".join(wrap(data_of(picture), 76))  # as base64 and openssl write it
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": lines}}


@pytest.fixture(scope="module")
def pictured_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pictured.build_artifact(tmp_path_factory.mktemp("pictured"))


@pytest.fixture(scope="module")
def sighted(pictured_so: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a folder for ended texts, to which those with pictures do not go."""
    folder = tmp_path_factory.mktemp("kept")
    with serving(pictured_so, "--prompt-cache", folder) as server:
        yield server
        assert chat(server, "b" * 12)[0] == 200
    with llmc.load(pictured_so) as model:
        kept = [model.restore(path) for path in folder.iterdir()]
        assert kept
        assert max(max(sequence.tokens) for sequence in kept) < model.info.n_ids


@pytest.fixture(scope="module")
def alone(pictured_so: Path) -> Iterator[Model]:
    with llmc.load(pictured_so, threads=1) as model:
        yield model


def chat(server: Server, content: object, **changes: Any) -> tuple[int, Any]:
    body = {**GREEDY, "max_tokens": 5, "messages": [{"role": "user", "content": content}], **changes}
    return server.ask("POST", CHATS, body)


def text_of(model: Model, text: str, pictures: list[Image.Image], n: int = 5) -> str:
    return model.decode(answer(model, text, pictures, n), after=model.encode(text[-1:], special=False))


def test_every_api_shows_pictures_in_its_own_form(sighted: Server, alone: Model) -> None:
    wanted = text_of(alone, "ub<image>c<image>a", [RED, BLUE])
    parts = [{"type": "text", "text": "b"}, in_chats(RED), {"type": "text", "text": "c"}, in_chats(BLUE)]
    status, said = chat(sighted, parts)
    assert (status, said["choices"][0]["message"]["content"]) == (200, wanted)
    assert said["usage"]["prompt_tokens"] == len("ubca") + 2 * TILE_ROWS
    items = [{"type": "input_text", "text": "b"}, in_responses(RED)]
    items += [{"type": "input_text", "text": "c"}, in_responses(BLUE)]
    body = {**GREEDY, "max_output_tokens": 5, "input": [{"role": "user", "content": items}]}
    status, said = sighted.ask("POST", RESPONSES, body)
    assert (status, said["output"][0]["content"][0]["text"]) == (200, wanted)
    blocks = [{"type": "text", "text": "b"}, in_messages(RED), {"type": "text", "text": "c"}, in_messages(BLUE)]
    body = {**GREEDY, "max_tokens": 5, "messages": [{"role": "user", "content": blocks}]}
    status, said = sighted.ask("POST", MESSAGES, body)
    assert (status, said["content"][0]["text"]) == (200, wanted)
    # the same picture again has the same rows, and the prompt is found
    assert said["usage"]["cache_read_input_tokens"] >= 2 * toy.PAGE_TOKENS


def test_tokens_are_counted_without_reading_pictures(sighted: Server) -> None:
    talk = [{"role": "user", "content": [in_messages(noise(4, 2, seed=9)), {"type": "text", "text": "abc"}]}]
    wanted = len("uabca") + TILE_ROWS
    assert sighted.ask("POST", f"{MESSAGES}/count_tokens", {"messages": talk})[1] == {"input_tokens": wanted}
    asked = [{"role": "user", "content": [in_responses(RED), {"type": "input_text", "text": "abc"}]}]
    assert sighted.ask("POST", f"{RESPONSES}/input_tokens", {"input": asked})[1]["input_tokens"] == wanted


def test_a_conversation_goes_on_from_a_response_with_pictures(sighted: Server, alone: Model) -> None:
    body = {**GREEDY, "max_output_tokens": 3, "input": [{"role": "user", "content": [in_responses(RED)]}]}
    first = sighted.ask("POST", RESPONSES, body)[1]
    said = first["output"][0]["content"][0]["text"]
    more = {**GREEDY, "max_output_tokens": 3, "input": "b", "previous_response_id": first["id"]}
    second = sighted.ask("POST", RESPONSES, more)[1]
    assert second["output"][0]["content"][0]["text"] == text_of(alone, f"u<image>a{said}uba", [RED], 3)


def test_a_tools_result_may_be_a_picture(sighted: Server, alone: Model) -> None:
    result = {"type": "tool_result", "tool_use_id": "x", "content": [in_messages(RED)]}
    talk = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": [result]},
    ]
    status, said = sighted.ask("POST", MESSAGES, {**GREEDY, "max_tokens": 5, "messages": talk})
    assert (status, said["content"][0]["text"]) == (200, text_of(alone, "ubact<image>a", [RED]))


@pytest.mark.parametrize(
    ("part", "param", "fact"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "image_url.url", "fetches nothing"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "image_url", "is no data: URL in base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, "image_url.url", "no data: URL in base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}, "image_url.url", "is not base64"),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}},
            "image_url.url",
            "this is no picture",
        ),
        ({"type": "image_url"}, "image_url", "must be a text"),
        ({"type": "input_image", "file_id": "f"}, "file_id", "files are not stored"),
        ({"type": "image", "source": {"type": "url", "url": "https://example.com"}}, "source", "fetches nothing"),
        ({"type": "image", "source": {"type": "base64", "data": 5}}, "source.data", "must be a text in base64"),
        ({"type": "image"}, "source", "must be"),
        ({"type": "input_audio", "input_audio": {}}, "", "the model reads nothing else"),
    ],
)
def test_other_pictures_are_refused(sighted: Server, part: object, param: str, fact: str) -> None:
    status, said = chat(sighted, [{"type": "text", "text": "b"}, part])
    assert status == 400
    place = "messages[0].content[1]" + (f".{param}" if param else "")
    assert said["error"]["param"] == place
    assert said["error"]["message"].startswith(f"'{place}'")
    assert fact in said["error"]["message"]
    assert "\n" not in said["error"]["message"]


def test_who_may_not_show_pictures_is_told(sighted: Server) -> None:
    for role in ("system", "assistant", "developer"):
        talk = [{"role": role, "content": [in_chats(RED)]}, {"role": "user", "content": "b"}]
        status, said = sighted.ask("POST", CHATS, {**GREEDY, "messages": talk})
        assert (status, said["error"]["param"]) == (400, "messages[0].content[0]")


def test_a_mark_in_a_text_is_no_picture(sighted: Server) -> None:
    status, said = chat(sighted, [in_chats(RED), {"type": "text", "text": "<image>"}])
    assert status == 400
    assert "the prompt has 2 places for pictures (<image>), and 1 is given" in said["error"]["message"]
    status, said = chat(sighted, "<image>")
    assert (status, said["error"]["param"]) == (400, "messages")
    assert said["error"]["message"].endswith("the prompt has 1 place for pictures (<image>), and none is given")
    status, said = sighted.ask("POST", "/v1/completions", {"prompt": ["b", "<image>"], "max_tokens": 1})
    assert (status, said["error"]["param"]) == (400, "prompt")
    assert (
        sighted.complete(prompt=[toy_pictured.TOKEN], max_tokens=1)["usage"]["prompt_tokens"] == 1
    )  # ids are what they are


def test_a_prompt_with_too_many_pictures_is_refused(sighted: Server) -> None:
    status, said = chat(sighted, [in_chats(RED)] * toy.CONTEXT)
    assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
    status, said = chat(sighted, [{"type": "image_url", "image_url": "data:;base64,"}] * (MOST_PICTURES + 1))
    assert (status, said["error"]["message"]) == (400, "'messages' has 101 pictures; at most 100")


def test_ids_of_rows_are_not_taken_from_clients(sighted: Server) -> None:
    chat(sighted, [in_chats(RED)])
    status, said = sighted.ask("POST", "/v1/completions", {"prompt": [3, toy.VOCAB], "max_tokens": 1})
    assert (status, f"has the token {toy.VOCAB}" in said["error"]["message"]) == (400, True)


def test_bodies_may_be_larger_where_pictures_are_taken(sighted: Server, server: Server) -> None:
    large = [{"type": "text", "text": "b" * (9 << 20)}]
    assert chat(sighted, large)[1]["error"]["code"] == "context_length_exceeded"
    status, said = chat(server, large)
    assert (status, said["error"]["message"]) == (413, "the body of the request is larger than 8 MiB")


def test_a_model_of_texts_reads_nothing_else(server: Server) -> None:
    status, said = chat(server, [in_chats(RED)])
    assert status == 400
    assert said["error"]["message"].endswith("the model reads nothing else")


def test_a_text_with_pictures_is_drawn_several_times(sighted: Server, alone: Model) -> None:
    status, said = chat(sighted, [in_chats(RED)], n=2)
    assert status == 200
    wanted = text_of(alone, "u<image>a", [RED])
    assert [choice["message"]["content"] for choice in said["choices"]] == [wanted] * 2


def test_a_stream_with_pictures_is_the_answer(sighted: Server, alone: Model) -> None:
    body = {**GREEDY, "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": [in_chats(BLUE)]}]}
    with sighted.open("POST", CHATS, body) as response:
        lines = response.read().decode()
    pieces = [
        line.partition('"content":"')[2].partition('"')[0] for line in lines.splitlines() if '"content":"' in line
    ]
    assert "".join(pieces) == text_of(alone, "u<image>a", [BLUE])


# -- between steps -----------------------------------------------------------------------------------------------------


def test_an_errand_is_run_between_two_steps_of_others(alone: Model) -> None:
    served, done = Served(alone), list[int]()
    job = served.job(prompt(3), 6)
    served.submit(job)
    served.engine.start()

    def errand() -> int:
        assert not done
        done.append(job.n_said)
        return 7

    assert served.engine.call(errand) == 7
    with pytest.raises(ValueError, match="wrong"):
        served.engine.call(lambda: int("wrong"))
    served.engine.drain(5)
    with pytest.raises(Closing):
        served.engine.call(errand)
    for _ in range(500):
        if job.finish:
            break
        time.sleep(0.01)
    served.engine.close()
    assert (job.finish, len(done)) == ("length", 1)


def test_a_text_without_pictures_waits_for_no_step(alone: Model) -> None:
    images = alone.images
    with ThreadPoolExecutor(1) as other, alone.running():
        assert other.submit(images.prompt, prompt(3), []).result(5).ids == tuple(prompt(3))


def test_who_gives_way_reads_its_pictures_again(pictured_so: Path) -> None:
    with llmc.load(pictured_so, threads=1, kv_tokens=toy.CONTEXT + 2) as model:
        served = Served(model)
        jobs = []
        for picture, salt in ((RED, 0), (BLUE, 20), (RED, 40)):
            pictured = model.images.prompt([toy_pictured.TOKEN, *prompt(4, salt)], [Picture.of(picture)])
            jobs.append(served.job(pictured.ids, 14))
            jobs[-1].ask = replace(jobs[-1].ask, pictures=pictured.seen)
        served.submit(*jobs)
        served.finish(*jobs)
        assert served.engine.meters.counts["preemptions"] > 0
        served.check(*jobs)
        served.leave()


def test_errands_that_wait_when_the_server_ends_are_told(alone: Model) -> None:
    served = Served(alone)
    job = served.job(prompt(3), 6)
    served.submit(job)
    first, second = (served.engine.later(lambda: 1) for _ in range(2))
    served.engine.drain(0)
    assert not served.engine.collect()
    for waiting in (first, second):
        with pytest.raises(Closing):
            waiting.result(0)


def test_pictures_stand_where_they_stood_in_the_request() -> None:
    parts = [in_chats(RED), {"type": "text", "text": "b"}, in_chats(BLUE)]
    asked = read_chat({"messages": [{"role": "user", "content": parts}] * 2}, "m", 1, takes_pictures=True)
    assert [picture.place for picture in asked.pictures] == [
        f"messages[{message}].content[{part}].image_url.url" for message in (0, 1) for part in (0, 2)
    ]
    with pytest.raises(ApiError, match="at most 100"):
        check_pictures(asked.pictures * 26, "messages")
    assert read_picture_part("x", {"type": "text", "text": "b"}) is None


def test_a_url_of_parameters_alone_takes_no_memory() -> None:
    part = {"type": "input_image", "image_url": "data:" + ";" * 1_000_000}
    tracemalloc.start()
    with pytest.raises(ApiError, match=r"no data: URL in base64"):
        read_picture_part("x", part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20

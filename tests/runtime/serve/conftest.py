"""Servers of the stub model, each a process of its own, and a client for them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import llmc
from llmc.runtime.binding import Model
from tests.runtime.stub_artifact import characters_json, stub_code, write_stub
from tests.runtime.toy_cuda import FakeCuda

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-c", "from llmc.cli.main import main; main(prog_name='llmc')"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judge here') }}{% endif %}"
    "{{ bos_token + ' ' + m.content | trim }}{% endfor %}{% if add_generation_prompt %} a{% endif %}{{ also }}"
)
TALKING_TEMPLATE = (
    "{% if tools %}{{ tools | length }}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.n + 1 }}{% endfor %}{% endfor %}"
    "{% if think or enable_thinking %}<think>{% elif think == false %}<think></think>{% endif %}"
)
CHAT = {"template": TEMPLATE, "tokens": {"bos_token": "<s>"}}
KEY, ORIGIN = "secret", "https://chat.example.com"


def write_served_stub(path: Path, **changes: Any) -> Path:
    """A stub that chats."""
    return write_stub(path, chat=CHAT, **changes)


class Server:
    """A running `llmc serve`."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process, self.address = process, address.removeprefix("http://")

    @contextmanager
    def open(self, method: str, path: str, body: object = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """The response as it begins; its body is still to be read.  body: bytes are sent as they are."""
        connection = http.client.HTTPConnection(self.address, timeout=30)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **headers}
        with closing(connection):
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in given.items()})
            with connection.getresponse() as response:
                yield response

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """(status, the body: parsed if it is JSON)."""
        with self.open(method, path, body, **headers) as response:
            text = response.read().decode()
        return response.status, json.loads(text) if response.headers["content-type"] == "application/json" else text

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that must succeed."""
        status, said = self.ask("POST", "/v1/completions", {"temperature": 0, "ignore_eos": True, **body})
        assert status == 200, said
        return dict(said)

    def metric(self, name: str) -> int:
        status, page = self.ask("GET", "/metrics")
        assert status == 200
        return next(int(line.split()[1]) for line in page.splitlines() if line.startswith(f"llmc_{name} "))


@contextmanager
def serving(artifact: Path, *arguments: object) -> Iterator[Server]:
    """A server until the end of the block, where it is asked to stop."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*COMMAND, "serve", str(artifact), "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " is served at http://127.0.0.1:" in line, process.communicate()
            yield Server(process, line.split()[-1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                _, words = process.communicate(timeout=30)
            finally:
                process.kill()
            assert (process.returncode, "Traceback" in words) == (0, False), words


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_stub(tmp_path_factory.mktemp("stub") / "stub.so")


@pytest.fixture(scope="module")
def slow_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of it takes 40 ms."""
    return write_served_stub(tmp_path_factory.mktemp("slow") / "slow.so", code=stub_code(step_ms=40))


@pytest.fixture(scope="module")
def server(stub: Path) -> Iterator[Server]:
    with serving(stub) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(slow_stub: Path) -> Iterator[Server]:
    """One text at a time, and one that waits; with a key, and for the scripts of a web page."""
    limits = ("--max-batch", 1, "--queue", 1, "--grace", 0.2)
    with serving(slow_stub, *limits, "--api-key", KEY, "--allow-origin", ORIGIN) as server:
        yield server


@pytest.fixture(scope="session")
def talking_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that can write calls, and thoughts, as its template shows them."""
    path, tokenizer = tmp_path_factory.mktemp("talking") / "a.so", characters_json()
    for letter, character in zip("HIJKLMNO", ("<think>", "</think>", *"_ĠĊ<>/"), strict=True):
        tokenizer = tokenizer.replace(f'"{letter}"', json.dumps(character))
    chat = {"template": TALKING_TEMPLATE, "tokens": {}}
    return write_stub(path, chat=chat, tokenizer=tokenizer, code=stub_code(n_context=320))


@pytest.fixture(scope="session")
def talking(talking_so: Path) -> Iterator[Server]:
    with serving(talking_so) as server:
        yield server
        assert server.metric("running") == 0


@pytest.fixture
def model(toy_so: Path) -> Iterator[Model]:
    with llmc.load(toy_so, threads=1) as model:
        yield model


@pytest.fixture
def gpu_model(cuda: FakeCuda, cuda_so: Path) -> Iterator[Model]:
    with llmc.load(cuda_so) as model:
        assert model.runs_ahead
        yield model


def events_of(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The server-sent events, parsed; the last one as text."""
    for line in response:
        if line.strip():
            assert line.startswith(b"data: ")
            text = line[6:].decode().strip()
            yield text if text == "[DONE]" else json.loads(text)


def named_events_of(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events whose name is their type, parsed."""
    for head in iter(response.readline, b""):
        event = json.loads(response.readline().removeprefix(b"data: "))
        assert head == f"event: {event['type']}\n".encode()
        assert response.readline() == b"\n"
        yield event

"""`llmc serve` under load: tokens a second and time to the first token, for 1, 4 and 8 clients.

    llmc compile examples/stories/model -o build/stories.so
    python bench/serve.py build/stories.so [--clients 1,4,8] [--requests 6] [--tokens 128] [--prompt 64]
                                           [--schema] [--record bench/records/NAME.json]

Each client asks for one stream after the other, greedy and of the full length; every prompt is another.  The server is
a process of its own, and so are the clients: one for all of them, which shares the machine with the server.  Beside the
server's figures stand the runtime's own, right before and right after them: as many sequences, decoded together by
`Model.advance`, with nobody asking.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llmc.bench.limits import cpu_name
from llmc.runtime import load
from llmc.runtime.generation import GREEDY

SERVE = "from llmc.cli.main import main; main(['serve', *__import__('sys').argv[1:]])"

TURNS = 3
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "minItems": 1000, "items": PERSON}
"""No text here is long enough to come to its end."""


class Times(NamedTuple):
    """Times of one stream: seconds to its first piece of text and to its end, and the tokens in it."""

    first_s: float
    total_s: float
    n_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", default="1,4,8")
    parser.add_argument("--requests", type=int, default=6, help="of each client")
    parser.add_argument("--tokens", type=int, default=128, help="generated for each")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--schema", action="store_true", help="the same with texts that follow a JSON schema, in turns")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    clients = [int(n) for n in options.clients.split(",")]
    if options.tokens < 2:
        parser.error("--tokens: at least 2, for there is something between tokens then")
    with serving(options.artifact, options.threads) as address:
        load_of(address, options, clients[0], salt=0)  # the first steps bring the weights into memory
        points = [point(address, options, n) for n in clients]
    record = {
        "artifact": options.artifact.name,
        "machine": cpu_name(),
        "date": datetime.date.today().isoformat(),
        "prompt_tokens": options.prompt,
        "generated_tokens": options.tokens,
        "points": points,
    }
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def prompt_of(n_tokens: int, number: int) -> list[int]:
    """Token ids; prompts of different numbers differ within their first three tokens."""
    return [1, 3 + number % 997, *(5 + (7 * i + number) % 900 for i in range(n_tokens - 2))]


def runtime_alone(options: argparse.Namespace, n: int) -> float:
    """Tokens a second of n sequences that are decoded together, prompts not counted."""
    room = n * (options.prompt + options.tokens + 64)
    with load(options.artifact, threads=options.threads, kv_tokens=room) as model:
        sequences = [model.sequence() for _ in range(n)]
        for number, sequence in enumerate(sequences):
            sequence.feed(prompt_of(options.prompt, number))
        start = time.perf_counter()
        for _ in range(options.tokens):
            model.advance([(sequence, GREEDY) for sequence in sequences])
        seconds = time.perf_counter() - start
    return round(float(n * options.tokens) / seconds, 1)


@contextmanager
def serving(artifact: Path, threads: int) -> Iterator[str]:
    """The address of a server until the end of the block."""
    command = [sys.executable, "-c", SERVE, str(artifact), "--port", "0", "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1].removeprefix("http://")
        finally:
            process.terminate()


def point(address: str, options: argparse.Namespace, n_clients: int) -> dict[str, Any]:
    """What so many clients get together, between two runs of the runtime alone."""
    before = runtime_alone(options, n_clients)
    said: dict[str, Any] = {"clients": n_clients, **measured(address, options, n_clients, 1)}
    if options.schema:
        turns = [measured(address, options, n_clients, turn, bool(turn % 2)) for turn in range(2, 2 + 2 * TURNS)]
        said["in_turns"] = {"plain": turns[::2], "schema": turns[1::2]}
    return said | {"runtime_tokens_per_s": [before, runtime_alone(options, n_clients)]}


def measured(
    address: str, options: argparse.Namespace, n_clients: int, turn: int, follows_schema: bool = False
) -> dict[str, float]:
    start = time.perf_counter()
    times = load_of(address, options, n_clients, 1000 * n_clients + 100_000 * turn, follows_schema)
    seconds = time.perf_counter() - start
    between = [(one.total_s - one.first_s) / (one.n_tokens - 1) for one in times]
    return {
        "tokens_per_s": round(sum(one.n_tokens for one in times) / seconds, 1),
        "first_token_ms": round(1000 * statistics.median(one.first_s for one in times), 2),
        "first_token_ms_worst": round(1000 * max(one.first_s for one in times), 2),
        "between_tokens_ms": round(1000 * statistics.median(between), 3),
    }


def load_of(
    address: str, options: argparse.Namespace, n_clients: int, salt: int, follows_schema: bool = False
) -> list[Times]:
    def client(number: int) -> list[Times]:
        with closing(http.client.HTTPConnection(address, timeout=600)) as connection:
            first = salt + number * options.requests
            prompts = [prompt_of(options.prompt, first + i) for i in range(options.requests)]
            return [stream(connection, prompt, options.tokens, follows_schema) for prompt in prompts]

    with ThreadPoolExecutor(n_clients) as pool:
        return [times for listed in pool.map(client, range(n_clients)) for times in listed]


def stream(
    connection: http.client.HTTPConnection, prompt: Sequence[int], n_tokens: int, follows_schema: bool = False
) -> Times:
    """Ask for a text and read it as it comes."""
    body = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "return_token_ids": True}
    if follows_schema:
        body["structured_outputs"] = {"json": SCHEMA}
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first_s, n = 0.0, 0
    for line in response:
        first_s = first_s or time.perf_counter() - start
        if line.startswith(b"data: {"):
            n = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", n)
    return Times(first_s, time.perf_counter() - start, n)


if __name__ == "__main__":
    main()

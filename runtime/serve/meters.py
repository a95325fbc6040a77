"""What the engine counts, and its page for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
WAIT_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
COUNTERS = {
    "prompt_tokens": "Tokens of prompts, those included that another sequence had already.",
    "reused_tokens": "Tokens of prompts whose keys and values another sequence had already.",
    "generated_tokens": "Tokens generated.",
    "guessed_tokens": "Guesses at tokens that were checked.",
    "right_guesses": "Guesses that were right.",
    "texts": "Texts begun.",
    "cancelled": "Texts that their client gave up.",
    "failed": "Texts that ended with an error.",
    "preemptions": "Times that a text gave its pages up for older ones, to be read again later.",
}


class Histogram:
    """Seconds, counted in buckets up to each limit."""

    def __init__(self, limits: tuple[float, ...]) -> None:
        self.limits, self.counts, self.total = limits, [0] * (len(limits) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[sum(seconds > limit for limit in self.limits)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Prometheus' cumulative buckets."""
        n = 0
        for limit, count in zip((*map(str, self.limits), "+Inf"), self.counts, strict=True):
            n += count
            yield f'{name}_bucket{{le="{limit}"}} {n}'
        yield f"{name}_sum {self.total}"
        yield f"{name}_count {n}"


class State(NamedTuple):
    """The engine's state at a moment."""

    running: int
    waiting: int
    kv_pages: int
    kv_pages_free: int


GAUGES = {
    "running": "Texts being generated.",
    "waiting": "Texts in the queue.",
    "kv_pages": "Pages of the KV cache.",
    "kv_pages_free": "Pages that hold nothing; those kept for later prompts are given up when they are needed.",
}


class Meters:
    """Counters and times; the engine's thread writes, any thread reads."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0)
        self.step = Histogram(STEP_SECONDS)
        self.first_token = Histogram(WAIT_SECONDS)

    def add(self, counter: str, n: int = 1) -> None:
        self.counts[counter] += n

    def page(self, state: State, responses: Mapping[int, int], n_connections: int) -> str:
        """The text that Prometheus reads.  responses: to HTTP requests, by status.  n_connections: that are open."""
        lines = list(block("http_responses_total", "counter", "Responses by status.", ()))
        lines += [f'llmc_http_responses_total{{status="{status}"}} {n}' for status, n in sorted(responses.items())]
        lines += block("open_connections", "gauge", "Open connections.", (f"llmc_open_connections {n_connections}",))
        for name, text in COUNTERS.items():
            lines += block(f"{name}_total", "counter", text, (f"llmc_{name}_total {self.counts[name]}",))
        for name, text in GAUGES.items():
            lines += block(name, "gauge", text, (f"llmc_{name} {getattr(state, name)}",))
        lines += block("step_seconds", "histogram", "Time of a step.", self.step.lines("llmc_step_seconds"))
        times = self.first_token.lines("llmc_first_token_seconds")
        lines += block("first_token_seconds", "histogram", "From a request to its first token.", times)
        return "\n".join(lines) + "\n"


def block(name: str, kind: str, text: str, samples: Iterable[str]) -> Iterator[str]:
    yield f"# HELP llmc_{name} {text}"
    yield f"# TYPE llmc_{name} {kind}"
    yield from samples

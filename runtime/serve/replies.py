"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmc.runtime.serve.job import Finish, Job

DONE = b"data: [DONE]\n\n"


def encoded(value: object) -> bytes:
    """JSON in ASCII, so that nothing a client sent can spoil it."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


@dataclass
class Reply:
    """One answer: whole, or as chunks.

    kind: of the request.  echoes: of completions that begin with their prompts: the prompt of each text.
    """

    kind: Literal["completion", "chat"]
    model: str
    with_ids: bool = False
    echoes: Sequence[str] = ()
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'cmpl' if self.kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def head(self, is_chunk: bool) -> dict[str, Any]:
        name = "text_completion" if self.kind == "completion" else "chat.completion" + ".chunk" * is_chunk
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, jobs: Sequence[Job], texts: Sequence[str]) -> dict[str, Any]:
        """The answer in one piece; jobs have ended, texts are theirs."""
        choices = [self.choice(job, text) for job, text in zip(jobs, texts, strict=True)]
        return {**self.head(False), "choices": choices, "usage": usage(jobs)}

    def choice(self, job: Job, text: str) -> dict[str, Any]:
        said: dict[str, Any] = {"index": job.index}
        if self.kind == "completion":
            said["text"] = self.echo(job) + text
        else:
            said["message"] = {"role": "assistant", "content": text, "refusal": None}
        said |= {"logprobs": None, "finish_reason": job.finish}
        return said | ({"token_ids": job.tokens} if self.with_ids else {})

    def echo(self, job: Job) -> str:
        return self.echoes[job.index] if self.echoes else ""

    def openings(self, jobs: Iterable[Job]) -> Iterable[dict[str, Any]]:
        """The chunks that come before any token: the prompt echoed, or who speaks."""
        for job in jobs:
            if self.kind == "chat":
                yield self.chunk_of(job, {"delta": {"role": "assistant", "content": ""}}, None)
            elif self.echoes:
                yield self.chunk_of(job, {"text": self.echo(job)}, None)

    def chunk(self, job: Job, text: str, finish: Finish | None) -> dict[str, Any]:
        """A piece of a text."""
        if self.kind == "completion":
            return self.chunk_of(job, {"text": text}, finish)
        return self.chunk_of(job, {"delta": {"content": text} if text else {}}, finish)

    def chunk_of(self, job: Job, what: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        choice = {"index": job.index, **what, "logprobs": None, "finish_reason": finish}
        if self.with_ids and finish:
            choice["token_ids"] = job.tokens
        return {**self.head(True), "choices": [choice]}

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The last chunk, when the client asked for it."""
        return {**self.head(True), "choices": [], "usage": usage(jobs)}


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens; a prompt counts once, however many texts it has."""
    leaders = [job for job in jobs if job.is_leader]
    n_prompt, n_said = sum(len(job.ask.prompt) for job in leaders), sum(job.n_said for job in jobs)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_said,
        "total_tokens": n_prompt + n_said,
        "prompt_tokens_details": {"cached_tokens": sum(job.n_reused for job in leaders)},
    }

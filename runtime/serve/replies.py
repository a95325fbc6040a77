"""Answers in the form of OpenAI's completions and chat completions, and what answers of all forms have in common."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from llmc.runtime.serve.answers import Answer, new_call_id
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.forms import Call
from llmc.runtime.serve.job import Finish, Job, Said
from llmc.runtime.serve.probs import TokenProb
from llmc.runtime.serve.wanted import Wanted

DONE = b"data: [DONE]\n\n"
SILENCE = b":\n\n"
"""A comment, which readers of server-sent events pass over."""


def encoded(value: object) -> bytes:
    """JSON in ASCII, so that nothing a client sent can spoil it."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(value: object) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """A server-sent event that has its type as its name too."""
    return f"event: {value['type']}\n".encode() + event(value)


class Reply(Protocol):
    """An answer in the form of one API: whole, or as server-sent events.  pulse: one that says nothing."""

    pulse: bytes

    def whole(self, jobs: Sequence[Job], texts: Sequence[str]) -> dict[str, Any]:
        """The answer in one piece; jobs have ended, texts are theirs."""

    def opening(self, jobs: Sequence[Job]) -> bytes:
        """The events that come before any token."""

    def piece(self, said: Said) -> bytes:
        """The events of a piece of a text; none while nothing of it is to be shown."""

    def ending(self, jobs: Sequence[Job]) -> bytes:
        """The events behind all texts."""

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream that has failed."""


@dataclass
class Choices:
    """A reply of OpenAI's with a choice for each text.

    kind: of the request.  echoes: of completions that begin with their prompts: the prompt of each text.  answer: makes
    what takes a chat's text apart.
    """

    kind: Literal["completion", "chat"]
    model: str
    wanted: Wanted
    echoes: Sequence[str] = ()
    answer: Callable[[], Answer] = Answer
    pulse: bytes = field(default=SILENCE, init=False)
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'cmpl' if self.kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._answers: dict[int, Answer] = {}  # by index
        self._n_told = 0
        self._offsets: dict[int, int] = {}  # by index: where in its text the next token's begins
        self._jobs: Sequence[Job] = ()

    def head(self, is_chunk: bool) -> dict[str, Any]:
        name = "text_completion" if self.kind == "completion" else "chat.completion" + ".chunk" * is_chunk
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, jobs: Sequence[Job], texts: Sequence[str]) -> dict[str, Any]:
        choices = [self.choice(job, text) for job, text in zip(jobs, texts, strict=True)]
        return {**self.head(False), "choices": choices, "usage": usage(jobs)}

    def choice(self, job: Job, text: str) -> dict[str, Any]:
        said: dict[str, Any] = {"index": job.index}
        if self.kind == "completion":
            said["text"] = self.echo(job) + text
        else:
            shown = self.apart(job, text, is_last=True)
            content = shown.pop("content", None if "tool_calls" in shown else "")
            said["message"] = {"role": "assistant", "content": content, "refusal": None, **shown}
        probs = [*job.prompt_probs, *job.probs]
        said |= {"logprobs": self.logprobs(job, probs), "finish_reason": self.reason(job, job.finish)}
        return said | ({"token_ids": job.tokens} if self.wanted.with_ids else {})

    def apart(self, job: Job, text: str, *, is_last: bool, is_chunk: bool = False) -> dict[str, Any]:
        """More of a message: {"reasoning_content", "content", "tool_calls"}, of each if there is some."""
        answer = self._answers.get(job.index)
        if answer is None:
            answer = self._answers[job.index] = self.answer()
        if answer.is_plain:
            return {"content": text} if text else {}
        n_before = answer.n_calls
        thought, parts = answer.push(text, is_last)
        said = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, Call)]
        shown: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        if said:
            shown["content"] = said
        if calls:
            numbers = [{"index": n_before + i} if is_chunk else {} for i in range(len(calls))]
            shown["tool_calls"] = [number | spelled_call(call) for number, call in zip(numbers, calls, strict=True)]
        return shown

    def reason(self, job: Job, finish: Finish | None) -> str | None:
        """Why a text has ended."""
        answer = self._answers.get(job.index)
        return "tool_calls" if finish == "stop" and answer is not None and answer.n_calls else finish

    def echo(self, job: Job) -> str:
        return self.echoes[job.index] if self.echoes else ""

    def opening(self, jobs: Sequence[Job]) -> bytes:
        """The prompts echoed, or who speaks."""
        self._jobs = jobs
        if self.kind == "chat":
            return b"".join(event(self.chunk_of(job, {"delta": {"role": "assistant", "content": ""}})) for job in jobs)
        return b"".join(event(self.chunk_of(job, {"text": self.echo(job)})) for job in jobs if self.echoes)

    def piece(self, said: Said) -> bytes:
        self._n_told += len(said.tokens)
        job, what = said.job, dict[str, Any]()
        if self.kind == "completion":
            what["text"] = said.text
        else:
            what["delta"] = self.apart(job, said.text, is_last=said.finish is not None, is_chunk=True)
            if not what["delta"] and not self.shows_all(said):
                return b""
        what["logprobs"] = self.logprobs(job, said.probs)
        if self.wanted.with_ids:
            what["token_ids"] = said.tokens
        reason = self.reason(job, said.finish)
        if reason is None or not what.get("delta"):
            return event(self.chunk_of(job, what, reason))
        # as OpenAI's: of a chunk with a reason some clients read that alone
        return event(self.chunk_of(job, what)) + event(self.chunk_of(job, {"delta": {}}, reason))

    def shows_all(self, said: Said) -> bool:
        """Whether there is a chunk though nothing of the text is shown yet."""
        is_plain = self._answers[said.job.index].is_plain
        return is_plain or said.finish is not None or self.wanted.with_ids or self.wanted.n_top is not None

    def chunk_of(self, job: Job, what: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": job.index, "logprobs": None, **what, "finish_reason": finish}
        chunk = {**self.head(True), "choices": [choice]}
        if self.wanted.with_running_usage:
            chunk["usage"] = usage(self._jobs, self._n_told)
        elif self.wanted.with_usage:
            chunk["usage"] = None
        return chunk

    def ending(self, jobs: Sequence[Job]) -> bytes:
        """The events at the end, with the usage if the client asked for it."""
        last = event({**self.head(True), "choices": [], "usage": usage(jobs)}) if self.wanted.with_usage else b""
        return last + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body())

    def logprobs(self, job: Job, probs: Sequence[TokenProb]) -> dict[str, Any] | None:
        """The probabilities of a piece's tokens; None if they are not wanted."""
        if self.wanted.n_top is None:
            return None
        if self.kind == "chat":
            return {"content": [spelled_out(one) for one in probs], "refusal": None}
        texts = [text_of(one) for one in probs]
        *offsets, self._offsets[job.index] = accumulate(map(len, texts), initial=self._offsets.get(job.index, 0))
        return {
            "tokens": [name_of(one) for one in probs],
            "token_logprobs": [one.logprob for one in probs],
            "top_logprobs": [listed(one) for one in probs],
            "text_offset": offsets,
        }


def spelled_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": new_call_id(), "type": "function", "function": function}


def text_of(one: TokenProb) -> str:
    """A token that is half a character shows as U+FFFD."""
    return one.text.decode("utf-8", "replace")


def name_of(one: TokenProb) -> str:
    """A token's text, as completions name it; of one that is a part of a character its bytes, so that names differ."""
    try:
        return one.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.text)


def listed(one: TokenProb) -> dict[str, float | None] | None:
    """The most likely tokens in the place of this one, and this one."""
    return None if one.logprob is None else {name_of(top): top.logprob for top in (*one.top, one)}


def spelled_out(one: TokenProb) -> dict[str, Any]:
    """A token of a chat's answer, with the most likely ones in its place."""
    tops = [{"token": text_of(top), "logprob": top.logprob, "bytes": list(top.text)} for top in one.top]
    return {"token": text_of(one), "logprob": one.logprob, "bytes": list(one.text), "top_logprobs": tops}


def usage(jobs: Sequence[Job], n_told: int | None = None) -> dict[str, Any]:
    """Tokens; a prompt counts once, however many texts it has.  n_told: of the texts so far, which may have more."""
    leaders = [job for job in jobs if job.is_leader]
    n_prompt = sum(len(job.ask.prompt) for job in leaders)
    n_said = sum(job.n_said for job in jobs) if n_told is None else n_told
    details: dict[str, Any] = {}
    if any(job.counts_thoughts for job in jobs):
        details["completion_tokens_details"] = {"reasoning_tokens": sum(job.n_thought for job in jobs)}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_said,
        "total_tokens": n_prompt + n_said,
        "prompt_tokens_details": {"cached_tokens": sum(job.n_reused for job in leaders)},
        **details,
    }

"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import string
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from llmc.runtime.serve.job import Finish, Job, Said
from llmc.runtime.serve.probs import TokenProb
from llmc.runtime.serve.thoughts import Scanner
from llmc.runtime.serve.tools import Call, CallScanner

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

    kind: of the request.  echoes: of completions that begin with their prompts: the prompt of each text.  scan: makes
    what finds the calls in a text, if there are any to be found; split: what finds the thought that it begins with,
    which is shown if with_thoughts.  told: what chunks say of their usage, after so many tokens.
    """

    kind: Literal["completion", "chat"]
    model: str
    with_ids: bool = False
    with_probs: bool = False
    echoes: Sequence[str] = ()
    scan: Callable[[], CallScanner] | None = None
    split: Callable[[], Scanner] | None = None
    with_thoughts: bool = True
    told: Callable[[int], dict[str, Any]] | None = None
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id = f"{'cmpl' if self.kind == 'completion' else 'chatcmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._scanners: dict[int, CallScanner] = {}  # by index
        self._splitters: dict[int, Scanner] = {}  # by index
        self._n_told = 0
        self._offsets: dict[int, int] = {}  # by index: where in its text the next token's begins

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
            thought, answer = self.divided(job, text, is_last=True)
            content, calls = self.scanned(job, answer, is_last=True, is_chunk=False)
            shown = content or (None if calls else "")
            said["message"] = {"role": "assistant", "content": shown, "refusal": None, **thought, **calls}
        probs = [*job.prompt_probs, *job.probs]
        said |= {"logprobs": self.logprobs(job, probs), "finish_reason": self.reason(job, job.finish)}
        return said | ({"token_ids": job.tokens} if self.with_ids else {})

    def divided(self, job: Job, text: str, *, is_last: bool) -> tuple[dict[str, str], str]:
        """-> ({"reasoning_content": …} if there is some, the answer)."""
        if self.split is None:
            return {}, text
        if job.index not in self._splitters:
            self._splitters[job.index] = self.split()
        thought, answer = self._splitters[job.index].push(text, is_last)
        return {"reasoning_content": thought} if thought and self.with_thoughts else {}, answer

    def scanned(self, job: Job, text: str, *, is_last: bool, is_chunk: bool) -> tuple[str, dict[str, Any]]:
        """-> (what of a text is said to people, {"tool_calls": …} if there are some)."""
        if self.scan is None:
            return text, {}
        if job.index not in self._scanners:
            self._scanners[job.index] = self.scan()
        scanner = self._scanners[job.index]
        first = scanner.n_calls
        said, calls = scanner.push(text, is_last)
        listed = [({"index": first + i} if is_chunk else {}) | spelled_call(call) for i, call in enumerate(calls)]
        return said, {"tool_calls": listed} if calls else {}

    def reason(self, job: Job, finish: Finish | None) -> str | None:
        """Why a text has ended."""
        scanner = self._scanners.get(job.index)
        return "tool_calls" if finish == "stop" and scanner is not None and scanner.n_calls else finish

    def echo(self, job: Job) -> str:
        return self.echoes[job.index] if self.echoes else ""

    def openings(self, jobs: Iterable[Job]) -> Iterable[dict[str, Any]]:
        """The chunks that come before any token: the prompt echoed, or who speaks."""
        for job in jobs:
            if self.kind == "chat":
                yield self.chunk_of(job, {"delta": {"role": "assistant", "content": ""}})
            elif self.echoes:
                yield self.chunk_of(job, {"text": self.echo(job)})

    def chunk(self, said: Said) -> dict[str, Any] | None:
        """A piece of a text; None: nothing of it is to be shown yet."""
        self._n_told += len(said.tokens)
        job, what = said.job, dict[str, Any]()
        if self.kind == "completion":
            what["text"] = said.text
        else:
            is_last = said.finish is not None
            thought, answer = self.divided(job, said.text, is_last=is_last)
            content, calls = self.scanned(job, answer, is_last=is_last, is_chunk=True)
            what["delta"] = thought | ({"content": content} if content else {}) | calls
            if (self.scan or self.split) and not (what["delta"] or said.finish or self.with_ids or self.with_probs):
                return None
        what["logprobs"] = self.logprobs(job, said.probs)
        if self.with_ids:
            what["token_ids"] = said.tokens
        return self.chunk_of(job, what, self.reason(job, said.finish))

    def chunk_of(self, job: Job, what: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": job.index, "logprobs": None, **what, "finish_reason": finish}
        return {**self.head(True), "choices": [choice], **(self.told(self._n_told) if self.told else {})}

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The last chunk, when the client asked for it."""
        return {**self.head(True), "choices": [], "usage": usage(jobs)}

    def logprobs(self, job: Job, probs: Sequence[TokenProb]) -> dict[str, Any] | None:
        """The probabilities of a piece's tokens; None if they are not wanted."""
        if not self.with_probs:
            return None
        if self.kind == "chat":
            return {"content": [spelled_out(one) for one in probs], "refusal": None}
        texts = [text_of(one) for one in probs]
        *offsets, self._offsets[job.index] = accumulate(map(len, texts), initial=self._offsets.get(job.index, 0))
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in probs],
            "top_logprobs": [listed(one) for one in probs],
            "text_offset": offsets,
        }


def spelled_call(call: Call) -> dict[str, Any]:
    """With an id of nine letters and digits: some templates take no other."""
    name = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": name, "type": "function", "function": function}


def text_of(one: TokenProb) -> str:
    """A token that is half a character shows as U+FFFD."""
    return one.text.decode("utf-8", "replace")


def listed(one: TokenProb) -> dict[str, float | None] | None:
    """The most likely tokens in the place of this one, and this one."""
    return None if one.logprob is None else {text_of(top): top.logprob for top in (*one.top, one)}


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
    if any(job.ask.thinking is not None and job.ask.thinking.closing is not None for job in jobs):
        details["completion_tokens_details"] = {"reasoning_tokens": sum(job.n_thought for job in jobs)}
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_said,
        "total_tokens": n_prompt + n_said,
        "prompt_tokens_details": {"cached_tokens": sum(job.n_reused for job in leaders)},
        **details,
    }

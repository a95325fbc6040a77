"""Answers of Anthropic's /v1/messages: blocks, the events in which they come, and errors."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.answers import Answer, Block, Blocks, Change, Kind
from llmc.runtime.serve.anthropic_requests import NO_THREADS
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.job import Job, Said
from llmc.runtime.serve.replies import named_event
from llmc.runtime.serve.wanted import Wanted

PATH = "/v1/messages"
EMPTY: dict[Kind, dict[str, Any]] = {
    "thought": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
    "call": {"type": "tool_use", "input": {}},
}
DELTAS: dict[Kind, tuple[str, str]] = {
    "thought": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
"""By kind of block: the type of the delta that brings more of it, and the field of that with the text."""
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
"""The types of errors by status; other statuses below 500 are invalid requests."""


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The body of an error, in the form of the API that was asked.  path: of the request."""
    return anthropic_error(error) if path.startswith(PATH) else error.body()


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    said: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code == NO_THREADS:
        said["details"] = {"error_code": NO_THREADS, "unsupported": ["thread"]}
    return {"type": "error", "error": said}


class MessageReply:
    """One answer (see replies.Reply)."""

    pulse = named_event({"type": "ping"})

    def __init__(self, model: str, wanted: Wanted, answer: Answer) -> None:
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._wanted = wanted
        self._blocks = Blocks(answer)

    def whole(self, jobs: Sequence[Job], texts: Sequence[str]) -> dict[str, Any]:
        [job], [text] = jobs, texts
        list(self._blocks.push(text, True))
        content = [whole_block(block) for block in self._blocks.blocks]
        return {**self._head, "content": content, **self._end_of(job), "usage": usage_of(job)}

    def opening(self, jobs: Sequence[Job]) -> bytes:
        begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_of(jobs[0])}
        return named_event({"type": "message_start", "message": self._head | begun})

    def piece(self, said: Said) -> bytes:
        changes = self._blocks.push(said.text, said.finish is not None)
        return b"".join(map(changed, changes))

    def ending(self, jobs: Sequence[Job]) -> bytes:
        [job] = jobs
        last = {"type": "message_delta", "delta": self._end_of(job), "usage": usage_of(job)}
        return named_event(last) + named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return named_event(anthropic_error(error))

    def _end_of(self, job: Job) -> dict[str, Any]:
        """Why the answer has ended."""
        if job.finish == "length":
            is_full = job.n_said < (self._wanted.max_tokens or 0)
            return {"stop_reason": "model_context_window_exceeded" if is_full else "max_tokens", "stop_sequence": None}
        reason = "tool_use" if self._blocks.n_calls else "stop_sequence" if job.stop is not None else "end_turn"
        return {"stop_reason": reason, "stop_sequence": job.stop}


def changed(change: Change) -> bytes:
    """The event that tells of a change."""
    block, place = change.block, {"index": change.block.index}
    if change.what == "begin":
        return named_event({"type": "content_block_start", **place, "content_block": begun_block(block)})
    if change.what == "end":
        return named_event({"type": "content_block_stop", **place})
    kind, name = DELTAS[block.kind]
    return named_event({"type": "content_block_delta", **place, "delta": {"type": kind, name: change.text}})


def begun_block(block: Block) -> dict[str, Any]:
    named = {"id": block.call_id, "name": block.name} if block.kind == "call" else {}
    return {**EMPTY[block.kind], **named}


def whole_block(block: Block) -> dict[str, Any]:
    if block.kind == "call":
        return begun_block(block) | {"input": parse_json(block.text)}
    return begun_block(block) | {DELTAS[block.kind][1]: block.text}


def usage_of(job: Job) -> dict[str, Any]:
    """A text's tokens so far; those of the prompt that were cached are told apart once the text has begun."""
    n_cached, details = job.n_reused, dict[str, Any]()
    if job.counts_thoughts:
        details["output_tokens_details"] = {"thinking_tokens": job.n_thought}
    return {
        "input_tokens": len(job.ask.prompt) - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": job.n_said,
        **details,
    }

"""Answers of /v1/responses: items, and the events in which they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmc.runtime.parse_json import parse_json
from llmc.runtime.serve.answers import Answer, Block, Blocks, Change, Kind
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.job import Job, Said
from llmc.runtime.serve.namespaces import names_of
from llmc.runtime.serve.replies import SILENCE, named_event, usage
from llmc.runtime.serve.stored import Messages
from llmc.runtime.serve.turns import Turns

Keep = Callable[[dict[str, Any], Messages], None]


class ItemForm(NamedTuple):
    """How a kind of block is written as an item.

    prefix: of its id.  text: the field that has its text.  stream: how the names of its events begin.
    part: the fields that its one part has beside the text; empty: it has no parts.
    """

    prefix: str
    text: str
    stream: str
    part: dict[str, Any]


ITEM_FORMS: dict[Kind, ItemForm] = {
    "thought": ItemForm("rs", "text", "response.reasoning_text", {"type": "reasoning_text"}),
    "text": ItemForm("msg", "text", "response.output_text", {"type": "output_text", "annotations": [], "logprobs": []}),
    "call": ItemForm("fc", "arguments", "response.function_call_arguments", {}),
}


class ResponseReply:
    """One answer (see replies.Reply)."""

    pulse = SILENCE

    def __init__(self, model: str, said: dict[str, Any], answer: Answer, keep: Keep | None = None) -> None:
        """said: what it repeats of the request.  keep: given the response and what the assistant says in it, for later,
        if it has ended."""
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **said,
        }
        self._blocks, self._keep = Blocks(answer), keep
        self._names = names_of(said.get("tools", []))
        self._n_events = 0

    def whole(self, jobs: Sequence[Job], texts: Sequence[str]) -> dict[str, Any]:
        [job], [text] = jobs, texts
        list(self._blocks.push(text, True))
        return self._ended(job)

    def opening(self, jobs: Sequence[Job]) -> bytes:
        begun = self._response(None)
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def piece(self, said: Said) -> bytes:
        is_last = said.finish is not None
        changes = list(self._blocks.push(said.text, is_last))
        is_cut = said.finish == "length"
        return b"".join(event for change in changes for event in self._changed(change, is_cut))

    def ending(self, jobs: Sequence[Job]) -> bytes:
        response = self._ended(jobs[0])
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        output = [self._item(block, self._status(block, True)) for block in self._blocks.blocks]
        failed = {"status": "failed", "error": {"code": "server_error", "message": error.message}, "output": output}
        return self._event("response.failed", response=self._response(None) | failed)

    def _ended(self, job: Job) -> dict[str, Any]:
        response = self._response(job)
        if self._keep is not None:
            self._keep(response, turns_of(self._blocks.blocks))
        return response

    def _response(self, job: Job | None) -> dict[str, Any]:
        """job: that has ended; None: it has not."""
        is_cut = job is not None and job.finish == "length"
        status = "in_progress" if job is None else "incomplete" if is_cut else "completed"
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(block, self._status(block, is_cut)) for block in self._blocks.blocks],
            "usage": usage_of(job) if job is not None else None,
        }

    def _status(self, block: Block, is_cut: bool) -> str:
        """The status of a block that has ended.  is_cut: whether the answer was cut off."""
        return "incomplete" if is_cut and block is self._blocks.blocks[-1] and block.kind != "call" else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": item_id(block), "status": status}
        content = [part_of(block, block.text)] if status != "in_progress" else []
        if block.kind == "thought":
            return item | {"type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
        if block.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": content}
        arguments = block.text if status != "in_progress" else ""
        named = {"type": "function_call", "call_id": block.call_id, **self._named(block), "arguments": arguments}
        return item | named

    def _named(self, block: Block) -> Mapping[str, str]:
        """The name of a call's function, and of its group if it has one."""
        return self._names.get(block.name, {"name": block.name})

    def _changed(self, change: Change, is_cut: bool) -> Iterator[bytes]:
        block, form = change.block, ITEM_FORMS[change.block.kind]
        place: dict[str, Any] = {"item_id": item_id(block), "output_index": block.index}
        also: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        in_part = place | ({"content_index": 0} if form.part else {})
        if change.what == "begin":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if form.part:
                yield self._event("response.content_part.added", **in_part, part=part_of(block, ""))
        elif change.what == "more":
            yield self._event(f"{form.stream}.delta", **in_part, **also, delta=change.text)
        else:
            named = {"name": self._named(block)["name"]} if block.kind == "call" else also
            yield self._event(f"{form.stream}.done", **in_part, **named, **{form.text: block.text})
            if form.part:
                yield self._event("response.content_part.done", **in_part, part=part_of(block, block.text))
            item = self._item(block, self._status(block, is_cut))
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._n_events = self._n_events, self._n_events + 1
        return named_event({"type": kind, "sequence_number": number, **fields})


def turns_of(blocks: Sequence[Block]) -> Messages:
    """An answer as messages of a conversation."""
    turns = Turns()
    for block in blocks:
        if block.kind == "thought":
            turns.think(block.text)
        elif block.kind == "text":
            turns.say("assistant", block.text)
        else:
            turns.call(block.call_id, block.name, parse_json(block.text))
    return turns.messages


def item_id(block: Block) -> str:
    return f"{ITEM_FORMS[block.kind].prefix}_{block.id}"


def part_of(block: Block, text: str) -> dict[str, Any]:
    return {**ITEM_FORMS[block.kind].part, "text": text}


def usage_of(job: Job) -> dict[str, Any]:
    counts = usage([job])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": job.n_thought},
        "total_tokens": counts["total_tokens"],
    }

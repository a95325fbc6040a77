"""/v1/embeddings, as OpenAI has it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmc.runtime.embedding import Embedding, Rows, finished
from llmc.runtime.serve.fields import ApiError, Fields, is_ids, is_text, wrong
from llmc.runtime.serve.requests import Prompt

FIELDS = ("model", "input", "encoding_format", "dimensions", "user", "priority")
MOST_INPUTS = 2048
"""The most inputs of a request, as many as OpenAI takes."""


class Asked(NamedTuple):
    """dimensions: the first so many, None: all.  in_base64: as the bytes of float32, rather than as numbers."""

    prompts: tuple[Prompt, ...]
    dimensions: int | None
    in_base64: bool


def read_embeddings(body: object, model: str, how: Embedding) -> Asked:
    """Raises ApiError."""
    fields = Fields(body)
    fields.refuse_unknown(FIELDS)
    fields.check_model(model)
    kind = fields.of_type("encoding_format", str, "float", "'float' or 'base64'")
    if kind not in ("float", "base64"):
        raise wrong("encoding_format", "must be 'float' or 'base64'")
    dimensions = fields.integer("dimensions", how.size, 1, how.size)
    return Asked(read_input(fields.get("input")), dimensions if fields.get("dimensions") else None, kind == "base64")


def read_input(value: object) -> tuple[Prompt, ...]:
    """The inputs: a text, token ids, or a list of either."""
    if is_text(value) or is_ids(value):
        return (value if isinstance(value, str) else tuple(value),)  # type: ignore[arg-type]
    if not isinstance(value, list) or not value or len(value) > MOST_INPUTS:
        raise wrong("input", f"must be a text, token ids, or a list of 1 to {MOST_INPUTS} of either")
    if not all(map(is_text, value)) and not all(map(is_ids, value)):
        raise wrong("input", "must have texts alone, or lists of token ids; none of them empty")
    return tuple(one if isinstance(one, str) else tuple(one) for one in value)


def in_groups(prompts: Sequence[tuple[int, ...]], most: int) -> Iterator[Sequence[tuple[int, ...]]]:
    for start in range(0, len(prompts), most):
        yield prompts[start : start + most]


def answer_of(rows: Sequence[Rows], asked: Asked, how: Embedding, model: str, n_tokens: int) -> dict[str, Any]:
    """The answer.  rows: what each embedding is made of, float32 [size]."""
    made = finished(np.stack(rows), how, asked.dimensions)
    data = [
        {"object": "embedding", "index": index, "embedding": in_base64(row) if asked.in_base64 else row.tolist()}
        for index, row in enumerate(made)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def in_base64(row: Rows) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def no_embeddings(does: str) -> ApiError:
    """does: what the model does in their place."""
    return ApiError(400, f"this model {does}, and makes no embeddings", code="unsupported_model")


def no_texts(does: str, instead: str) -> ApiError:
    """does: what the model does in their place.  instead: the endpoint for that."""
    return ApiError(400, f"this model {does}, and writes no texts; use {instead}", code="unsupported_model")

"""/v1/rerank, as Jina, Cohere and TEI have it, and /classify, as vLLM does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llmc.runtime.classification import Classification, best_first
from llmc.runtime.embedding import Rows
from llmc.runtime.serve.embeddings import MOST_INPUTS
from llmc.runtime.serve.fields import ApiError, Fields, is_text, wrong

RANK_FIELDS = ("model", "query", "documents", "top_n", "return_documents", "truncate", "raw_scores", "user", "priority")
TEI_FIELDS = ("query", "texts", "return_text", "truncate", "truncation_direction", "raw_scores")
CLASSIFY_FIELDS = ("model", "input", "truncate", "raw_scores", "user", "priority")
Pair = tuple[str, ...]
"""The texts that are judged together: one, or two."""


class Asked(NamedTuple):
    """texts: what is judged, and where they stand in the request.  truncate: cut those that are too long.  raw: logits
    in place of scores.  top, returns, is_tei: of a ranking: the best so many, None: all; with the documents; in TEI's
    form."""

    texts: tuple[Pair, ...]
    field: str
    truncate: bool
    raw: bool
    top: int | None = None
    returns: bool = False
    is_tei: bool = False


def read_rank(body: object, model: str, how: Classification) -> Asked:
    """Raises ApiError."""
    fields = Fields(body)
    is_tei = fields.get("texts") is not None
    fields.refuse_unknown(TEI_FIELDS if is_tei else RANK_FIELDS)
    fields.check_model(model)
    if len(how.labels) != 1:
        fact = f"this model gives {len(how.labels)} labels, and ranks nothing; use /classify"
        raise ApiError(400, fact, code="unsupported_model")
    query, name = fields.get("query"), "texts" if is_tei else "documents"
    if not is_text(query):
        raise wrong("query", "must be a text that is not empty")
    fields.refuse({"truncation_direction": (("right", "Right"), "texts are cut at their ends")})
    documents = read_documents(fields.get(name), name)
    top = fields.integer("top_n", len(documents), 1, MOST_INPUTS)
    returns = fields.boolean("return_text" if is_tei else "return_documents")
    texts = tuple((query, document) for document in documents)
    return Asked(texts, name, fields.boolean("truncate"), fields.boolean("raw_scores"), top, returns, is_tei)


def read_documents(value: object, name: str) -> list[str]:
    """Documents: texts, or objects with a text each."""
    if isinstance(value, list) and 0 < len(value) <= MOST_INPUTS:
        texts = [one["text"] if isinstance(one, dict) and one.keys() == {"text"} else one for one in value]
        if all(map(is_text, texts)):
            return [str(text) for text in texts]
    raise wrong(name, f'must be a list of 1 to {MOST_INPUTS} texts, or objects like {{"text": …}}; none of them empty')


def read_classify(body: object, model: str) -> Asked:
    """Raises ApiError."""
    fields = Fields(body)
    fields.refuse_unknown(CLASSIFY_FIELDS)
    fields.check_model(model)
    value = fields.get("input")
    listed = [value] if is_text(value) else value
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST_INPUTS:
        raise wrong("input", f"must be a text, or a list of 1 to {MOST_INPUTS} texts or pairs of texts")
    texts = [tuple(one) if isinstance(one, list) else (one,) for one in listed]
    if not all(len(text) in (1, 2) and all(map(is_text, text)) for text in texts):
        raise wrong("input", "must have texts alone, or pairs of texts; none of them empty")
    return Asked(tuple(texts), "input", fields.boolean("truncate"), fields.boolean("raw_scores"))


def scores_of(rows: Sequence[Rows], asked: Asked, how: Classification) -> Rows:
    """float32 [texts, labels].  rows: the logits of each."""
    logits = np.stack(rows)
    return logits if asked.raw else how.scores(logits)


def rank_answer(rows: Sequence[Rows], asked: Asked, how: Classification, model: str, n_tokens: int) -> Any:
    """The answer: the best first."""
    score, document = ("score", "text") if asked.is_tei else ("relevance_score", "document")
    results: list[dict[str, Any]] = []
    for index, value in best_first(scores_of(rows, asked, how)[:, 0], asked.top):
        text: Any = asked.texts[index][-1]
        said = {document: text if asked.is_tei else {"text": text}} if asked.returns else {}
        results.append({"index": index, score: value} | said)
    if asked.is_tei:
        return results
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": results, "usage": usage}


def classify_answer(
    rows: Sequence[Rows], asked: Asked, how: Classification, model: str, n_tokens: int
) -> dict[str, Any]:
    """The answer: of each text the most likely label, and the scores of all."""
    data = [
        {"index": index, "label": how.labels[int(row.argmax())], "probs": row.tolist(), "num_classes": len(row)}
        for index, row in enumerate(scores_of(rows, asked, how))
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    name = f"classify-{uuid.uuid4().hex}"
    return {"object": "list", "id": name, "created": int(time.time()), "model": model, "data": data, "usage": usage}


def no_labels(does: str) -> ApiError:
    """does: what the model does in their place."""
    return ApiError(400, f"this model {does}, and gives texts no labels", code="unsupported_model")

"""Embeddings of texts, by an artifact of a model that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from llmc.runtime.errors import LlmcError, shortened

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Ids
    from llmc.runtime.sequence import Sequence

Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
T = TypeVar("T")
TOGETHER, ROWS = 16, 64
"""The most texts that are read in one step; and how many rows of logits are looked at together."""


@dataclass(frozen=True)
class Embedding:
    """How embeddings are made.  size: elements of one.  pooling: "last", of a text's last token, "cls", of its first,
    or "mean" over all.  normalized: brought to length 1.  whole: texts are read whole, and pooled by the artifact."""

    size: int
    pooling: str
    normalized: bool
    whole: bool = False

    @property
    def of_last(self) -> bool:
        """Whether an embedding is made of what the artifact gives at the last token alone."""
        return self.whole or self.pooling != "mean"

    @classmethod
    def of(cls, record: dict[str, Any] | None, place: str) -> Embedding | None:
        """From a manifest's record; None: the artifact makes none.  place: the artifact's, for the LlmcError."""
        if not record:
            return None
        try:
            settings = str(record["pooling"]), bool(record["normalized"]), bool(record.get("whole"))
            return cls(int(record["size"]), *settings)
        except (AttributeError, LookupError, TypeError, ValueError):
            fact, hint = "the manifest does not say how embeddings are made", "compile the model again with this llmc"
            raise LlmcError(fact, place=place, hint=hint) from None


def embed(model: Model, texts: Iterable[str | Iterable[int]], dimensions: int | None = None) -> Rows:
    """See Model.embed."""
    how = needs_embedding(model)
    if dimensions is not None and not 1 <= dimensions <= how.size:
        raise LlmcError(f"embeddings have 1 to {how.size} dimensions, not {dimensions}", place=str(model.path))
    listed = [as_ids(model, text, index) for index, text in enumerate(several(texts))]
    rows = np.empty((len(listed), how.size), np.float32)
    start = 0
    for group in groups(model, listed):
        rows[start : start + len(group)] = read(model, how, group)
        start += len(group)
    return finished(check_finite(rows, str(model.path)), how, dimensions)


def check_finite(rows: Rows, place: str) -> Rows:
    """The rows, one for each text.  Raises LlmcError for the first one with a NaN or an infinity, as generating
    does."""
    broken = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(broken):
        fact, text = "what the model makes of this is not finite", f"text {broken[0] + 1}"
        hint = "look for weights that are not finite, or too large for the model's dtype"
        raise LlmcError(fact, place=f"{place} ({text})", hint=hint)
    return rows


def several(texts: Iterable[T]) -> Iterable[T]:
    """The texts.  Raises LlmcError for a single string, each character of which would be taken for a text."""
    if isinstance(texts, str):
        raise LlmcError("this is one text, where several are read", place=repr(shortened(texts)), hint="give a list")
    return texts


def needs_embedding(model: Model) -> Embedding:
    """Raises LlmcError for a model that writes texts."""
    if model.embedding is None:
        does = "gives texts labels" if model.classification else "writes texts"
        fact, hint = f"the artifact {does}, and makes no embeddings", "compile the model with --task embed"
        raise LlmcError(fact, place=str(model.path), hint=hint)
    return model.embedding


def check_writes(model: Model) -> None:
    """Raise LlmcError for a model that makes embeddings, or gives texts labels."""
    if model.classification is not None:
        fact, hint = "the artifact gives texts labels, and writes none", "llmc classify, or Model.classify, gives them"
        raise LlmcError(fact, place=str(model.path), hint=hint)
    if model.embedding is not None:
        fact, hint = "the artifact makes embeddings, and writes no texts", "llmc embed, or Model.embed, makes them"
        raise LlmcError(fact, place=str(model.path), hint=hint)


def finished(rows: Rows, how: Embedding, dimensions: int | None = None) -> Rows:
    """The first `dimensions` of each embedding, brought to length 1 if embeddings are, or if they were cut."""
    cut = rows if dimensions is None else rows[:, :dimensions]
    if not how.normalized and cut.shape == rows.shape:
        return cut
    normalized: Rows = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12))
    return normalized


def as_ids(model: Model, text: str | Iterable[int], index: int) -> Ids:
    ids = model.check_ids(model.encode(text) if isinstance(text, str) else text)
    return check_length(model, ids, f"{model.path} (text {index + 1})")


def check_length(model: Model, ids: Ids, place: str, hint: str | None = None) -> Ids:
    """The text's tokens.  Raises LlmcError, naming its place, if it has none, or more than the model takes.  hint: what
    can be done then."""
    n_context = model.info.n_context
    if not len(ids):
        raise LlmcError("a text without tokens says nothing", place=place)
    if len(ids) > n_context:
        raise LlmcError(f"a text has {len(ids)} tokens; the model takes {n_context}", place=place, hint=hint)
    return ids


def groups(model: Model, texts: list[Ids]) -> Iterator[list[Ids]]:
    """Groups of texts, in order: as many together as the cache has room for, or, of whole texts, as a step has."""
    size, group, n_pages, n_tokens = model.page_tokens, list["Ids"](), 0, 0
    longest = model.info.max_step_tokens
    most = longest if model.is_whole else max(1, min(TOGETHER, longest))
    for text in texts:
        needed = -(-len(text) // size)
        is_full = len(group) == most or (model.is_whole and n_tokens + len(text) > longest)
        if group and (is_full or (n_pages + needed) * size > model.info.kv_tokens_free):
            yield group
            group, n_pages, n_tokens = [], 0, 0
        group.append(text)
        n_pages += needed
        n_tokens += len(text)
    if group:
        yield group


def read(model: Model, how: Embedding, texts: list[Ids]) -> Rows:
    """The embeddings of these texts before they are cut and brought to length 1: float32 [n, size]."""
    with ExitStack() as stack:
        sequences = [stack.enter_context(model.sequence()) for _ in texts]
        if not how.of_last:
            return np.stack([mean(sequence, ids, how) for sequence, ids in zip(sequences, texts, strict=True)])
        model.run_step([(sequence, ids, None) for sequence, ids in zip(sequences, texts, strict=True)])
        return np.stack([sequence.logits()[: how.size] for sequence in sequences])


def mean(sequence: Sequence, ids: Ids, how: Embedding) -> Rows:
    """The mean over the rows of all tokens, some at a time, since each is as long as the vocabulary."""
    total = np.zeros(how.size, np.float32)
    for start in range(0, len(ids), ROWS):
        total += sequence.feed_for_logits(ids[start : start + ROWS])[:, : how.size].sum(0)
    return total / np.float32(len(ids))

"""Labels of texts, and how well texts answer a query, by an artifact of a model for that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from llmc.runtime.embedding import Embedding, Rows, check_finite, check_length, groups, read, several
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from llmc.runtime.binding import Model
    from llmc.runtime.runner import Ids

Activation = Literal["sigmoid", "softmax", "identity"]
ACTIVATIONS: tuple[Activation, ...] = ("sigmoid", "softmax", "identity")
Text: TypeAlias = "str | tuple[str, str] | Iterable[int]"
"""A text, a pair of texts, or token ids."""


class Ranked(NamedTuple):
    """A document, by its place among those that were given, counted from 0, and its score."""

    document: int
    score: float


@dataclass(frozen=True)
class Classification:
    """How texts get labels.

    labels: their names.  activation: makes scores of logits.  n_types: how many types of tokens the model tells apart
    (2: those of the first and the second text of a pair; 1: none).  whole: whether texts are read whole."""

    labels: tuple[str, ...]
    activation: Activation
    n_types: int = 1
    whole: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """The manifest's record of it."""
        return asdict(self) | {"labels": list(self.labels)}

    @property
    def logits(self) -> Embedding:
        """The logits of a text as an embedding, since the artifact gives both in the same way."""
        return Embedding(len(self.labels), "last", normalized=False, whole=self.whole)

    @classmethod
    def of(cls, record: dict[str, Any] | None, place: str) -> Classification | None:
        """From a manifest's record; None: the artifact gives no labels.  place: the artifact's, for the LlmcError."""
        if not record:
            return None
        try:
            labels, activation = tuple(map(str, record["labels"])), ACTIVATIONS.index(record["activation"])
            return cls(labels, ACTIVATIONS[activation], int(record["n_types"]), bool(record["whole"]))
        except (AttributeError, LookupError, TypeError, ValueError):
            fact, hint = "the manifest does not say how texts get labels", "compile the model again with this llmc"
            raise LlmcError(fact, place=place, hint=hint) from None

    def scores(self, logits: Rows) -> Rows:
        """The scores of logits [n, labels]."""
        if self.activation == "identity":
            return logits
        if self.activation == "sigmoid":
            return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))).astype(np.float32)
        exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(-1, keepdims=True)).astype(np.float32)


def classify(model: Model, texts: Iterable[Text], *, raw: bool, truncate: bool) -> Rows:
    """See Model.classify."""
    how = needs_labels(model)
    listed = [as_ids(model, how, text, index, truncate) for index, text in enumerate(several(texts))]
    rows = np.empty((len(listed), len(how.labels)), np.float32)
    start = 0
    for group in groups(model, listed):
        rows[start : start + len(group)] = read(model, how.logits, group)
        start += len(group)
    check_finite(rows, str(model.path))
    return rows if raw else how.scores(rows)


def rank(
    model: Model, query: str, documents: Iterable[str], top: int | None, *, raw: bool, truncate: bool
) -> list[Ranked]:
    """See Model.rank."""
    check_ranks(needs_labels(model), str(model.path))
    if top is not None and top < 1:
        raise LlmcError(f"a ranking has at least 1 document, not {top}", place="top")
    pairs = [(query, document) for document in several(documents)]
    return best_first(classify(model, pairs, raw=raw, truncate=truncate)[:, 0], top)


def best_first(scores: Rows, top: int | None = None) -> list[Ranked]:
    """The best `top` of scores [n]; equal ones in the order in which they were given."""
    order = np.argsort(-scores, kind="stable")[:top]
    return [Ranked(int(index), float(scores[index])) for index in order]


def needs_labels(model: Model) -> Classification:
    """Raises LlmcError for a model of another kind."""
    if model.classification is None:
        fact, hint = "the artifact gives texts no labels", "compile a classifier, or a reranker: --task classify"
        raise LlmcError(fact, place=str(model.path), hint=hint)
    return model.classification


def check_ranks(how: Classification, place: str) -> None:
    """Raise LlmcError for a model that gives more than one label, since nothing says which of them is the score."""
    if len(how.labels) != 1:
        fact = f"the artifact gives {len(how.labels)} labels, where a document's rank is of one"
        raise LlmcError(fact, place=place, hint="llmc classify, or Model.classify, gives the scores of all labels")


def as_ids(model: Model, how: Classification, text: Text, index: int, truncate: bool) -> Ids:
    """The tokens of the index-th text.  Raises LlmcError."""
    place = f"{model.path} (text {index + 1})"
    if not isinstance(text, str) and not is_pair(text):
        return check_length(model, model.check_ids(text), place)  # type: ignore[arg-type]
    parts = (text,) if isinstance(text, str) else tuple(map(str, text))
    try:
        ids = encode(model.tokenizer, parts, model.info.n_context if truncate else None)
    except (TypeError, ValueError):  # half a surrogate pair, or bytes that were no UTF-8
        raise LlmcError("the text is no valid Unicode", place=place, hint="give it in UTF-8") from None
    hint = "the first of the two is too long by itself" if truncate else "--truncate, or truncate=True, cuts it"
    return check_length(model, model.check_ids(with_types(ids, how, model.info.n_tokens)), place, hint)


def is_pair(text: object) -> bool:
    return isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text)


def encode(tokenizer: Tokenizer, parts: tuple[str, ...], most: int | None) -> Encoding:
    """The tokens of a text, or of a pair in the tokenizer's own template.

    most: the last part is cut so that there are at most so many; None: it is not cut.  One token of it is left in any
    case, so there are more if the first part takes all the room."""
    together = parts if len(parts) > 1 else parts[0]
    [encoding] = tokenizer.encode_batch([together])  # a batch, so that others run meanwhile
    if most is None or len(encoding) <= most:
        return encoding
    *first, last = tokenizer.encode_batch(list(parts), add_special_tokens=False)
    room = most - tokenizer.num_special_tokens_to_add(bool(first)) - sum(len(part.ids) for part in first)
    last.truncate(max(room, 1))  # of nothing every text would be judged alike
    return tokenizer.post_process(first[0], last) if first else tokenizer.post_process(last)


def with_types(encoding: Encoding, how: Classification, n_tokens: int) -> list[int]:
    """Token ids that say their types (llmc_info.n_types)."""
    if how.n_types == 1:
        return list(encoding.ids)
    pairs = zip(encoding.ids, encoding.type_ids, strict=True)
    return [token + n_tokens * min(kind, how.n_types - 1) for token, kind in pairs]

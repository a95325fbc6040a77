"""What transformers makes of texts that are given labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmc.compiler.certificate.reference_whole import arguments

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel

SHORT = 16
"""Tokens of texts that are read together, so that few are filled up to the length of long ones."""
Labels = np.ndarray[Any, np.dtype[np.float32]]


def labels_of(source: SourceModel, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[Labels]:
    """For each text the logits of its labels, float32 [1, labels].  Texts that are read whole are read one at a time;
    others together, filled up behind their ends with a token that none of them ends with: the model takes the last of
    a text's that is another."""
    if source.classification is not None and source.classification.whole:
        return [whole_text(source, model, text) for text in texts]
    ends = {text[-1] for text in texts}
    filler = next(token for token in range(source.n_vocab) if token not in ends)
    model.config.pad_token_id = filler
    rows: dict[int, Labels] = {}
    for is_short in (True, False):
        some = [index for index, text in enumerate(texts) if (len(text) <= SHORT) is is_short]
        longest = max((len(texts[index]) for index in some), default=0)
        tokens = [[*texts[index], *[filler] * (longest - len(texts[index]))] for index in some]
        if some:
            ids = torch.tensor(tokens)
            found = model(input_ids=ids, position_ids=torch.arange(longest).expand_as(ids), use_cache=False).logits
            rows |= {index: row[None].float().numpy() for index, row in zip(some, found, strict=True)}
    return [rows[index] for index in range(len(texts))]


def whole_text(source: SourceModel, model: PreTrainedModel, text: Sequence[int]) -> Labels:
    """The labels of one text, whose tokens' numbers say their types too."""
    types, ids = np.divmod(np.array(text), source.n_vocab)
    given = arguments(source, model, ids.tolist())
    if source.n_types > 1:
        given["token_type_ids"] = torch.tensor([types.tolist()])
    found: Labels = model(**given).logits.float().numpy()
    return found

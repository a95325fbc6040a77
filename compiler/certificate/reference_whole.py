"""What transformers makes of texts that are read whole: hidden states, pooled as sentence-transformers would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmc.compiler.frontend.export.first_position import FIRST_POSITION
from llmc.compiler.frontend.sentence_modules import Dense
from llmc.compiler.weights import Weight

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": torch.nn.Identity(),
    "Tanh": torch.tanh,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
}


def whole_texts(
    source: SourceModel, model: PreTrainedModel, texts: Sequence[Sequence[int]]
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """For each text float32 [n_tokens, size]: at its last token what its embedding is made of; at those before it what
    it would be if the pooling ended there.  One text at a time: nothing is filled up."""
    assert source.embedding is not None
    body = model.base_model
    found = []
    for text in texts:
        states = body(**arguments(source, body, text)).last_hidden_state[0]
        rows = pooled(states, source.embedding.pooling)
        for dense in source.embedding.dense:
            rows = through(rows, dense, source.weights)
        found.append(rows.float().numpy())
    return found


def arguments(source: SourceModel, model: PreTrainedModel, text: Sequence[int]) -> dict[str, Any]:
    """What the model is called with: tokens that are all of the text, whatever their numbers, and their positions."""
    first = int(source.graph.metadata_props.get(FIRST_POSITION, "0"))
    given = {
        "input_ids": torch.tensor([list(text)]),
        "position_ids": torch.arange(first, first + len(text))[None],
        "use_cache": False,
    }
    known = signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in known}


def pooled(states: torch.Tensor, pooling: str) -> torch.Tensor:
    """[n, K]: at each token the mean up to it, summed up in float32, the first, or its own."""
    if pooling == "mean":
        return (states.float().cumsum(0) / torch.arange(1, len(states) + 1)[:, None]).to(states.dtype)
    return states[:1].expand_as(states) if pooling == "cls" else states


def through(rows: torch.Tensor, dense: Dense, weights: Any) -> torch.Tensor:
    """A Dense module."""

    def tensor(name: str) -> torch.Tensor:
        weight: Weight = weights[f"{dense.path}.linear.{name}"]
        return torch.from_numpy(np.array(weight.stored_as("f32").stored())).to(rows.dtype)

    y = rows @ tensor("weight").T
    y = y + tensor("bias") if dense.bias else y
    return ACTIVATIONS[dense.activation](y)

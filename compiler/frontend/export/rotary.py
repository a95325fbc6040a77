"""Rotary embeddings whose angles change with the length of a text: they are kept from doing so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DYNAMIC, PLAIN = "dynamic", "default"
"""transformers' names: angles that change once a text is longer than the model's positions, and those that never do."""


def stretch_nothing(model: PreTrainedModel) -> None:
    """Make dynamic rotary embeddings (NTK, as in InternLM 3) plain ones.  Up to the model's own number of positions
    they are the same, and no artifact takes more tokens.  In place."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # of each kind of layers, where these differ
        if isinstance(kind, dict):
            module.rope_type = {layer: still(of_layer) for layer, of_layer in kind.items()}
        elif kind == DYNAMIC:
            module.rope_type = PLAIN


def still(kind: str) -> str:
    return PLAIN if kind == DYNAMIC else kind

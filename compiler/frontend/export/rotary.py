"""Rotary embeddings that look at how long a text is, as far as that can be known beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DYNAMIC, PLAIN = "dynamic", "default"
"""transformers' names: angles that change once a text is longer than the model's positions, and those that never do."""


def stretch_nothing(model: PreTrainedModel) -> None:
    """Let dynamic rotary embeddings (NTK, as InternLM 3 has them) be plain ones, which they are up to the model's own
    positions: no artifact takes more tokens, and a graph could not look how many there are.  In place."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # of each kind of layers, where these differ
        if isinstance(kind, dict):
            module.rope_type = {layer: still(of_layer) for layer, of_layer in kind.items()}
        elif kind == DYNAMIC:
            module.rope_type = PLAIN


def still(kind: str) -> str:
    return PLAIN if kind == DYNAMIC else kind

"""What the rows of pictures see in transformers' text model alone, whose own masks know of no pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import or_masks

from llmc.compiler.frontend.export.rows_in_text import numbered

IMPLEMENTATIONS = ("sdpa", "eager")
"""Of attention, as the reference has it."""


@contextmanager
def seeing_ahead(is_row: torch.Tensor) -> Iterator[None]:
    """Within it, the masks that transformers makes for texts let each picture's rows see those of it that are behind
    them.  is_row: bool [B, S]."""
    picture = numbered(is_row)

    def ahead(batch: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        here = picture[batch, query]
        return (here > 0) & (here == picture[batch, key]) & (key > query)

    def with_pictures(mask: Callable[..., Any]) -> Callable[..., Any]:
        def made(*sizes: Any, mask_function: Callable[..., torch.Tensor], **options: Any) -> Any:
            all_seen = {"mask_function": or_masks(mask_function, ahead), "allow_is_causal_skip": False}
            return mask(*sizes, **options | all_seen)

        return made

    masks = {name: AttentionMaskInterface()[name] for name in IMPLEMENTATIONS}
    try:
        for name, mask in masks.items():
            AttentionMaskInterface.register(name, with_pictures(mask))
        yield
    finally:
        for name, mask in masks.items():
            AttentionMaskInterface.register(name, mask)

"""Rows that go into later layers too: what a picture's rows add behind each of the first layers ("deepstack").

Meng et al. 2024, arXiv:2406.04334.  transformers' text parts are told so: `deepstack_visual_embeds`, a tensor for each
of so many layers, and `visual_pos_masks`, which tokens are a picture's.  Where these are added is seen by running a
text part with layers that change nothing; in a graph the results of these layers are marked (`llmc.Deepened`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from llmc.compiler.ops import DEEPENED, DOMAIN, VERSION
from llmc.runtime.errors import LlmcError

FEATURES = "deepstack_features"
"""What the tower gives besides rows: a list, for each layer what it gives of each picture."""
DEEP, WHERE = "deepstack_visual_embeds", "visual_pos_masks"
"""What the text part is told of that: float32 [n, d] for each layer, and bool [B, S]."""
ELSEWHERE = "rows go into later layers elsewhere than behind the first ones"


def stack_of(model: torch.nn.Module, n_layers: int) -> torch.nn.ModuleList:
    """The layers of a text part.  Raises LlmcError where it is not clear which they are."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    found = [stack for stack in lists if len(stack) == n_layers]
    if len(found) != 1:
        raise LlmcError(f"its text part has {len(found)} lists of {n_layers} layers")
    return found[0]


@contextmanager
def marked_layers(model: PreTrainedModel, n: int) -> Iterator[None]:
    """While it is traced, each of the first n layers gives its result as an `llmc.Deepened`."""

    def mark(part: int) -> Any:
        def hook(_: Any, __: Any, result: torch.Tensor) -> torch.Tensor:
            marked: torch.Tensor = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{DEEPENED}",
                (result,),
                {"part": part},
                dtype=result.dtype,
                shape=result.shape,
                version=VERSION,
            )
            return marked

        return hook

    layers = stack_of(model, model.config.num_hidden_layers)
    hooks = [layer.register_forward_hook(mark(1 + index)) for index, layer in enumerate(layers[:n])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Behind(Exception):
    """All layers have been run."""


def check_deep(decoder: PreTrainedModel, told: dict[str, Any]) -> None:
    """Raises LlmcError unless what the decoder is told of rows for later layers is added to these rows, and to nothing
    else, behind the first layers in their order.

    told: its DEEP and WHERE.
    """
    is_row, features = told[WHERE], told[DEEP]
    layers = stack_of(decoder, decoder.config.num_hidden_layers)
    seen: list[torch.Tensor] = []

    def nothing(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(hidden.clone())
        if len(seen) == len(layers):
            raise Behind
        return hidden

    if len(features) >= len(layers):
        raise LlmcError(ELSEWHERE)
    for layer in layers:
        layer.forward = nothing
    try:
        hidden = torch.randn(*is_row.shape, features[0].shape[-1])
        decoder(inputs_embeds=hidden, use_cache=False, **told)
    except Behind:
        pass
    finally:
        for layer in layers:
            del layer.forward
    for before, after, index in zip(seen, seen[1:], range(len(layers)), strict=False):
        wanted = before.clone()
        if index < len(features):
            wanted[is_row] += features[index]
        if not torch.equal(after, wanted):
            raise LlmcError(ELSEWHERE)

"""What a model's code works out while it reads a picture, and knows without looking at it: done, rather than traced.

Which of several tiles are no more than padding, which places patches have, what a mask of ones says: such code asks
tensors for their values, which a trace has none of.  Of a tile that is known to be one, all of this is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

MAKERS = (torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros)
"""What makes tensors of numbers alone."""


class KnownTensors(TorchFunctionMode):
    """While it is active, functions of tensors with values are evaluated, in the middle of a trace too.

    tile: the shape of the tile that is traced.  That it is nothing but zeros, as padding is, is known not to be.
    """

    def __init__(self, tile: tuple[int, ...]) -> None:
        self.tile = tile

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if function in (torch.Tensor.__eq__, torch.eq) and self.asks_for_zeros(*arguments):
            return evaluated(lambda: torch.zeros(tuple(arguments[0].shape), dtype=torch.bool))
        if function is torch.Tensor.__getitem__ and (takes_all(*arguments) or takes_in_order(*arguments)):
            return arguments[0]
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        if all(map(is_known, tensors)) and (tensors or function in MAKERS):
            return evaluated(lambda: function(*arguments, **options))
        return function(*arguments, **options)

    def asks_for_zeros(self, x: Any, other: Any) -> bool:
        """Whether a tile's elements are compared with 0."""
        return isinstance(other, float) and other == 0 and not is_known(x) and tuple(x.shape[-3:]) == self.tile


def is_known(x: Any) -> bool:
    """Whether the tensor has values: traced ones, and weights without memory, are of a class of their own."""
    return type(x) is torch.Tensor


def takes_all(x: Any, which: Any) -> bool:
    """Whether a traced tensor is asked for those of its parts that a mask counts, and it counts all."""
    is_mask = is_known(which) and which.dtype == torch.bool and which.dim() == 1
    return is_mask and not is_known(x) and evaluated(lambda: bool(which.all()))


def takes_in_order(x: Any, which: Any) -> bool:
    """Whether a traced tensor is asked for all of its parts by numbers, one after the other."""
    first, *rest = which if isinstance(which, tuple) else (which,)
    if is_known(x) or not is_known(first) or first.dtype != torch.long or first.shape != x.shape[:1]:
        return False
    return all(part == slice(None) for part in rest) and evaluated(
        lambda: bool((first.diff() == 1).all() and first[0] == 0)
    )


def evaluated(function: Callable[[], Any]) -> Any:
    """What a function gives, outside of every trace."""
    with _disable_current_modes():
        return function()

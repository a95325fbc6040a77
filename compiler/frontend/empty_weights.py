"""Modules whose parameters have a shape and no memory, while their buffers are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

LARGE = 1 << 28
"""A tensor of so many elements is taken for the weights of a layer's experts, rather than for a buffer."""


class LargeOnMeta(TorchFunctionMode):
    """While it is active, a tensor that is made empty or of zeros gets no memory if it has three axes and is large.

    accelerate takes a parameter's memory away once its module has it.  But a layer's experts are one parameter, of 43
    GB in float32 for 128 of Llama 4's, for which there would have to be memory at that moment.
    """

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if function in (torch.zeros, torch.empty):
            shape = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else arguments
            if len(shape) == 3 and prod(shape) >= LARGE:
                options["device"] = "meta"
        return function(*arguments, **options)


@contextmanager
def empty_weights() -> Iterator[None]:
    """While it is active, modules get parameters without memory."""
    with init_empty_weights(include_buffers=False), LargeOnMeta():
        yield

"""Complex numbers in a model's code, as two real tensors each: ONNX has none.

Rotary embedding may be written as a product of complex numbers: `torch.polar` and `torch.view_as_complex` make them,
`torch.view_as_real` takes them apart.  Under `ComplexPairs` the first two give a `Pair`, and no complex tensor is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Pair:
    """A complex tensor: its real and its imaginary part, of one shape.  It does what models do with it, no more."""

    def __init__(self, real: torch.Tensor, imaginary: torch.Tensor) -> None:
        self.real, self.imaginary = real, imaginary

    @property
    def device(self) -> torch.device:
        return self.real.device

    def to(self, *_: Any, **__: Any) -> Pair:
        """Itself: nothing moves while a model is traced."""
        return self

    def unsqueeze(self, axis: int) -> Pair:
        return Pair(self.real.unsqueeze(axis), self.imaginary.unsqueeze(axis))

    def __getitem__(self, places: Any) -> Pair:
        return Pair(self.real[places], self.imaginary[places])

    def __mul__(self, other: Any) -> Pair:
        if not isinstance(other, Pair):
            return Pair(self.real * other, self.imaginary * other)
        a, b, c, s = self.real, self.imaginary, other.real, other.imaginary
        return Pair(a * c - b * s, b * c + a * s)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.view_as_real:
            (pair,) = arguments
            return torch.stack((pair.real, pair.imaginary), dim=-1)
        return NotImplemented


class ComplexPairs(TorchFunctionMode):
    """While it is active, complex tensors are Pairs."""

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, arguments: Any = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.polar:
            size, angle = arguments
            return Pair(size * angle.cos(), size * angle.sin())
        if function is torch.view_as_complex:
            (pairs,) = arguments
            columns = pairs.flatten(-2)
            return Pair(columns[..., 0::2], columns[..., 1::2])
        return function(*arguments, **(options or {}))

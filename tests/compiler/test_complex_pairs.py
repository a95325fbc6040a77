"""compiler/frontend/export/complex_pairs.py"""

from __future__ import annotations

import pytest
import torch

from llmc.compiler.frontend.export.complex_pairs import ComplexPairs, Pair


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Pairs of x [2, 3, 8] by angles [3, 4], as models write it with complex numbers."""
    waves = torch.polar(torch.ones_like(angles), angles) * 1.25
    numbers = torch.view_as_complex(x.float().reshape(2, 3, 4, 2))
    return torch.view_as_real(numbers * waves.unsqueeze(0)[:, :, :].to(x.device)).flatten(2)


def test_pairs_of_reals_give_what_complex_numbers_give() -> None:
    x, angles = torch.randn(2, 3, 8), torch.randn(3, 4)
    with ComplexPairs():
        assert isinstance(torch.polar(angles, angles), Pair)
        found = turned(x, angles)
    torch.testing.assert_close(found, turned(x, angles))


def test_what_pairs_cannot_do_is_an_error() -> None:
    with ComplexPairs(), pytest.raises(TypeError):
        torch.angle(torch.polar(torch.ones(2), torch.ones(2)))

"""compiler/frontend/export/translations.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llmc.compiler import graph
from llmc.compiler.frontend.export.translations import TRANSLATIONS
from llmc.compiler.frontend.quiet import quiet


def exported(module: torch.nn.Module, x: torch.Tensor) -> Any:
    """What the module's ONNX gives."""
    with quiet():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
        found = torch.onnx.export(
            program, (), dynamo=True, opset_version=23, optimize=False, custom_translation_table=TRANSLATIONS
        )
    assert found is not None
    model: ir.Model = found.model
    return next(iter(graph.evaluate(model, {str(model.graph.inputs[0].name): x.numpy()}).values()))


class Spread(torch.nn.Module):
    def __init__(self, correction: int) -> None:
        super().__init__()
        self.correction = correction

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.std(x, dim=-1, keepdim=True, correction=self.correction)


class Quantile(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.special.erfinv(x)
        return y


@pytest.mark.parametrize("correction", [0, 1])
def test_a_standard_deviation_keeps_its_axis(correction: int) -> None:
    x = torch.randn(3, 5)
    np.testing.assert_allclose(exported(Spread(correction), x), Spread(correction)(x), rtol=0, atol=1e-6)


def test_the_inverse_of_the_error_function_is_right_to_float32() -> None:
    x = torch.linspace(-0.99, 0.99, 41)
    np.testing.assert_allclose(exported(Quantile(), x), Quantile()(x), rtol=0, atol=3e-6)

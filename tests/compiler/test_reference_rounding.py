"""What rounding costs transformers' own products, beside what it costs an artifact whose kernels round so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.compiler.certificate import bars
from llmc.compiler.certificate.reference_rounding import round_products
from llmc.compiler.driver import compile_model
from llmc.compiler.quantization.inputs import block_of, round_inputs
from llmc.compiler.quantization.quantize import Scheme


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_it_explains_what_an_artifact_loses(
    quant: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is usual here, so that the reference is asked."""
    usual = dataclasses.replace(bars.LOGITS, usual={quant: 0.0})
    monkeypatch.setattr(bars, "LOGITS", usual)
    report = compile_model(tiny_model("llama"), out=tmp_path / "m.so", quant=quant, batch=(1,), dtype="f32")
    certificate = report["certificate"]
    own = certificate["rounded_reference"]
    assert certificate["bar"]["kl_mean"] == pytest.approx(1.5 * own)
    assert 0.7 * own < certificate["kl_mean"] < 1.3 * own


def test_inputs_are_rounded_in_blocks_with_a_scale_each() -> None:
    assert [block_of(k) for k in (384, 192, 96, 50)] == [128, 64, 32, 32]
    x = np.zeros((1, 64), np.float32)
    x[0, :3], x[0, 32:34] = (1.0, -127.0, 0.4), (0.002, -1.27)
    wanted = np.zeros((1, 64), np.float32)
    wanted[0, :2], wanted[0, 33] = (1, -127), -1.27
    np.testing.assert_allclose(round_inputs(x, Scheme(4, 32)), wanted, rtol=1e-6)
    assert round_inputs(x, Scheme(8, number="fp")) is x


def test_weights_are_rounded_where_a_scheme_rounds_them() -> None:
    """Of linear layers and of experts; not of the product that makes the logits, where it is spared."""
    torch.manual_seed(0)
    products = [torch.nn.Linear(64, 8), torch.nn.Linear(64, 8), torch.nn.Linear(4, 8)]
    before = [product.weight.detach().clone() for product in products]
    with torch.inference_mode():
        round_products(torch.nn.ModuleList(products), Scheme(4, 32, lm_head=False), products[1], inputs=False)
        for product in products:
            product(torch.ones(1, product.in_features))
    changed = [not torch.equal(product.weight, old) for product, old in zip(products, before, strict=True)]
    assert changed == [True, False, False]
    groups = products[0].weight.reshape(-1, 32)
    assert max(len(group.unique()) for group in groups) <= 16

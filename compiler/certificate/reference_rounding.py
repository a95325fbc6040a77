"""What rounding weights to codes costs a model by itself: transformers', with products rounded as kernels round them.

It says whether an artifact that diverges much from its source does so because its model takes roundings badly, as small
trained ones do, or because it computes something else.  An estimate: products that kernels do together, with norms
folded into them, have other scales here, and a few small ones that are spared there (passes/quantize_weights.py) are
rounded here too.
"""

from __future__ import annotations

from typing import Any

import torch

from llmc.compiler.quantization.inputs import LEAST_INPUTS, round_inputs
from llmc.compiler.quantization.quantize import Scheme, quantize


def round_products(model: torch.nn.Module, scheme: Scheme, head: torch.nn.Module | None, *, inputs: bool) -> None:
    """Have each product of a model of float32, whenever it runs, multiply by weights that are rounded by the scheme.

    head: the product that makes the logits, in 8 bits unless the scheme says how; it is left alone if that is False.
    inputs: whether what is multiplied is rounded too, as on CPUs: to int8 in blocks, beside whole-numbered codes.
    """
    for name, module in model.named_modules():
        own = scheme.in_8_bits if f"{name}.weight" in scheme.wide else scheme
        if module is head:
            if scheme.lm_head is False:
                continue
            own = scheme if scheme.lm_head else scheme.in_8_bits
        if isinstance(module, torch.nn.Linear) and module.in_features >= LEAST_INPUTS:
            _round(module, ["weight"], own, inputs=inputs)
        elif matrices := [name for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3]:
            _round(module, matrices, own, inputs=False)  # of experts; what each reads is chosen within


def _round(module: torch.nn.Module, names: list[str], scheme: Scheme, *, inputs: bool) -> None:
    """Weights are rounded as late as this since they may be there no earlier (as_torch.lend)."""
    rounded: dict[str, torch.nn.Parameter] = {}

    def before(module: torch.nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        for name in names:
            if module._parameters[name] is not rounded.get(name):  # as it is each time where weights are lent
                found = _rounded(getattr(module, name).detach(), scheme)
                rounded[name] = module._parameters[name] = torch.nn.Parameter(found, requires_grad=False)
        if not inputs:
            return None
        x, *others = values
        rows = round_inputs(x.reshape(-1, x.shape[-1]).numpy(), scheme)
        return (torch.from_numpy(rows).reshape(x.shape), *others)

    module.register_forward_pre_hook(before)


def _rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    rows = weight.reshape(-1, weight.shape[-1]).numpy()
    return torch.from_numpy(quantize(rows, scheme).values()).reshape(weight.shape)

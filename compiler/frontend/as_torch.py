"""A source model as transformers runs it.

A model that is small is loaded whole, by transformers itself where there is a checkpoint.  Of a larger one, each
module's parameters are read when it is about to run and dropped when it has, so that a 7B takes about 2 GiB: reading is
most of the time, so ask for everything in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmc.compiler.frontend.classes import build, class_of
from llmc.compiler.frontend.classes import load as load_model
from llmc.compiler.frontend.config import parse_config
from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.kernel import DTYPE_BYTES
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
RESIDENT_BYTES = 2 << 30
"""A model of at most this size is held in memory."""


def as_torch(source: SourceModel, dtype: str, resident_bytes: int = RESIDENT_BYTES) -> PreTrainedModel:
    """The model as transformers has it, in `dtype`: "f32" or "bf16"."""
    distinct = {id(weight): weight for weight in source.weights.values()}
    n_bytes = sum(int(np.prod(weight.dims)) for weight in distinct.values()) * DTYPE_BYTES[dtype]
    resident = n_bytes <= resident_bytes
    transformers_logging.disable_progress_bar()
    config = parse_config(dict(source.config), source.name)
    attention = "sdpa" if class_of(config)._supports_sdpa else "eager"
    options: dict[str, Any] = {"dtype": TORCH_DTYPES[dtype], "attn_implementation": attention}
    options["experts_implementation"] = "eager"  # the model's own loop over its experts
    is_as_stored = not (source.random or source.is_part or source.packing or source.adapters)
    if resident and source.folder and is_as_stored:
        return load_model(source.folder, config, **options).eval()
    with empty_weights():
        model = build(config, **options).eval()
    model.tie_weights()
    lend(model, source.weights, dtype, keep=resident)
    return model


@contextmanager
def run_by_transformers(source: SourceModel, hint: str) -> Iterator[None]:
    """Around a model's run: what goes wrong there, as with a configuration that makes no sense, is an LlmcError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        fact = f"transformers itself cannot run the model: {' '.join(str(error).split())[:200]}"
        raise LlmcError(fact, place=source.name, hint=hint) from error


def lend(model: torch.nn.Module, weights: Mapping[str, Weight], dtype: str, *, keep: bool) -> None:
    """Give each module of a model its tensors: now and for good (keep), or each time it runs."""
    for prefix, module in model.named_modules():
        names = {own: f"{prefix}.{own}".lstrip(".") for own in (*module._parameters, *module._buffers)}
        own = {key: weights[name] for key, name in names.items() if name in weights}
        if own:
            _lend(module, own, dtype, keep=keep)


def _lend(module: torch.nn.Module, weights: dict[str, Weight], dtype: str, *, keep: bool) -> None:
    """Give a module its tensors: now and for good, or each time it runs."""

    def read(key: str) -> torch.Tensor:
        tensor = stored_as_tensor(weights[key], dtype)
        return torch.nn.Parameter(tensor, requires_grad=False) if key in module._parameters else tensor

    def give(*_: Any) -> None:
        for key in weights:
            tensors: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            tensors[key] = read(key)

    def take(*_: Any) -> None:
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    if keep:
        give()
        return
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    module._parameters, module._buffers = OnDemand(parameters, weights, read), OnDemand(buffers, weights, read)
    module.register_forward_pre_hook(give)
    module.register_forward_hook(take)


class OnDemand(dict[str, Any]):
    """A module's tensors, of which those that are lent are read, each time, where another module asks for them."""

    def __init__(self, tensors: Mapping[str, Any], lent: Container[str], read: Callable[[str], torch.Tensor]) -> None:
        super().__init__(tensors)
        self.lent, self.read = lent, read

    def __getitem__(self, key: str) -> Any:
        tensor = super().__getitem__(key)
        return self.read(key) if key in self.lent and tensor.is_meta else tensor


def stored_as_tensor(weight: Weight, dtype: str) -> torch.Tensor:
    """The weight's values as torch has them; torch knows no bfloat16 of NumPy's, so its bits are passed."""
    array = weight.stored_as("bf16" if dtype == "bf16" else "f32").stored()
    if dtype == "bf16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))

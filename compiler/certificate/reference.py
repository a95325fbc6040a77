"""What the source model says, by Hugging Face transformers: the judge of an artifact.

A model that is small is loaded whole, by transformers itself where there is a checkpoint.  Of a larger one, each
module's parameters are read when it is about to run and dropped when it has, so that a 7B takes about 2 GiB: reading is
most of the time, so ask for everything in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmc.compiler.certificate.reference_labels import labels_of
from llmc.compiler.certificate.reference_masks import seeing_ahead
from llmc.compiler.certificate.reference_rounding import round_products
from llmc.compiler.certificate.reference_whole import whole_texts
from llmc.compiler.frontend.classes import build, class_of
from llmc.compiler.frontend.classes import load as load_model
from llmc.compiler.frontend.config import parse_config
from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.frontend.export.deep_rows import DEEP, WHERE
from llmc.compiler.frontend.export.grids_in_text import positions_of
from llmc.compiler.frontend.quiet import quiet
from llmc.compiler.kernel import DTYPE_BYTES
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel
    from llmc.compiler.quantization.quantize import Scheme

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
Rows = np.ndarray[Any, np.dtype[np.float32]]
RESIDENT_BYTES = 2 << 30
"""A model of at most this size is held in memory."""


def reference_logits(
    source: SourceModel,
    prompts: Sequence[Sequence[int]],
    dtype: str = "f32",
    *,
    given: tuple[int, Rows] | None = None,
    grid: tuple[int, int] | None = None,
    rounding: Scheme | None = None,
    inputs: bool = True,
    resident_bytes: int = RESIDENT_BYTES,
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """The logits at every position of each prompt, float32 [n_tokens, n_vocab], computed in `dtype`: "f32" or "bf16";
    of a model for embeddings what these are made of, [n_tokens, size], and of one for labels theirs, [1, labels].
    given: the number of the first of the rows [n, d] that stand in prompts for tokens, and the rows, which are of one
    picture.  grid: its lines and columns, where that matters to positions.  rounding: how products are rounded, but for
    labels, and inputs: whether what they multiply is too (reference_rounding.py).

    One pass for all prompts: those that are shorter are filled up on the right, where a causal model does not look.
    """
    if source.embedding is not None and source.embedding.whole:
        with quiet(), torch.inference_mode():
            return whole_texts(source, rounded(_load(source, dtype, resident_bytes), rounding, inputs), prompts)
    if source.classification is not None:
        with quiet(), torch.inference_mode():
            return labels_of(source, _load(source, dtype, resident_bytes), prompts)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    positions = torch.arange(longest).expand_as(tokens)
    with quiet(), torch.inference_mode():
        model = rounded(_load(source, dtype, resident_bytes), rounding, inputs)
        read_out: list[torch.Tensor] = []
        if source.embedding is not None:
            head = torch.nn.Identity()
            head.register_forward_pre_hook(lambda _, values: read_out.append(values[0]))
            model.set_output_embeddings(head)
        read = {"input_ids": tokens} if given is None else embedded(model, tokens, *given, n_deep=source.n_deep)
        sees = seeing_ahead(tokens >= given[0]) if given is not None and source.sees_ahead else nullcontext()
        if given is not None and source.is_turned and grid is not None:
            positions = torch.stack([positions_of(is_row, [grid]) for is_row in tokens >= given[0]], dim=1)
        try:
            with sees:
                logits = model(**read, position_ids=positions, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of a configuration that makes no sense
            fact = f"transformers itself cannot run the model: {' '.join(str(error).split())[:200]}"
            hint = "--verify off compiles without the comparison"
            raise LlmcError(fact, place=source.name, hint=hint) from error
    results = read_out[0] if read_out else logits
    return [row[: len(prompt)].float().numpy() for row, prompt in zip(results, prompts, strict=True)]


def rounded(model: PreTrainedModel, scheme: Scheme | None, inputs: bool) -> PreTrainedModel:
    if scheme is not None:
        round_products(model, scheme, model.get_output_embeddings(), inputs=inputs)
    return model


def embedded(model: PreTrainedModel, tokens: torch.Tensor, first: int, rows: Rows, n_deep: int) -> dict[str, Any]:
    """What a model is told of tokens [B, S], of which those from `first` on stand for rows [n, d], by name: embeddings
    [B, S, d], and what rows add to n_deep layers, where they have so much more: [n, (1 + n_deep) d]."""
    is_row = tokens >= first
    found: torch.Tensor = model.get_input_embeddings()(tokens.masked_fill(is_row, 0))
    own, *deep = torch.from_numpy(rows).to(found.dtype)[tokens[is_row] - first].chunk(1 + n_deep, dim=-1)
    found[is_row] = own
    return {"inputs_embeds": found, **({DEEP: deep, WHERE: is_row} if n_deep else {})}


def _load(source: SourceModel, dtype: str, resident_bytes: int) -> PreTrainedModel:
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


def lend(model: torch.nn.Module, weights: Mapping[str, Weight], dtype: str, *, keep: bool) -> None:
    """Give each module of a model its tensors: now and for good (keep), or each time it runs."""
    for prefix, module in model.named_modules():
        names = {own: f"{prefix}.{own}".lstrip(".") for own in (*module._parameters, *module._buffers)}
        own = {key: weights[name] for key, name in names.items() if name in weights}
        if own:
            _lend(module, own, dtype, keep=keep)


def _lend(module: torch.nn.Module, weights: dict[str, Weight], dtype: str, *, keep: bool) -> None:
    """Give a module its tensors: now and for good, or each time it runs."""

    def give(*_: Any) -> None:
        for key, weight in weights.items():
            tensor = _tensor(weight, dtype)
            if key in module._parameters:
                module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[key] = tensor

    def take(*_: Any) -> None:
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    if keep:
        give()
        return
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    module.register_forward_pre_hook(give)
    module.register_forward_hook(take)


def _tensor(weight: Weight, dtype: str) -> torch.Tensor:
    """The weight's values as torch has them; torch knows no bfloat16 of NumPy's, so its bits are passed."""
    array = weight.stored_as("bf16" if dtype == "bf16" else "f32").stored()
    if dtype == "bf16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))

"""What the source model says, by Hugging Face transformers: the judge of an artifact.

Reading a large model's weights is most of the time (frontend/as_torch.py), so ask for everything in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llmc.compiler.certificate.reference_labels import labels_of
from llmc.compiler.certificate.reference_masks import seeing_ahead
from llmc.compiler.certificate.reference_rounding import round_products
from llmc.compiler.certificate.reference_whole import whole_texts
from llmc.compiler.frontend.as_torch import RESIDENT_BYTES, as_torch, run_by_transformers
from llmc.compiler.frontend.export.deep_rows import DEEP, WHERE
from llmc.compiler.frontend.export.grids_in_text import positions_of
from llmc.compiler.frontend.quiet import quiet

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel
    from llmc.compiler.quantization.quantize import Scheme

Rows = np.ndarray[Any, np.dtype[np.float32]]


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
            return whole_texts(source, rounded(as_torch(source, dtype, resident_bytes), rounding, inputs), prompts)
    if source.classification is not None:
        with quiet(), torch.inference_mode():
            return labels_of(source, as_torch(source, dtype, resident_bytes), prompts)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    positions = torch.arange(longest).expand_as(tokens)
    with quiet(), torch.inference_mode():
        model = rounded(as_torch(source, dtype, resident_bytes), rounding, inputs)
        read_out: list[torch.Tensor] = []
        if source.embedding is not None:
            head = torch.nn.Identity()
            head.register_forward_pre_hook(lambda _, values: read_out.append(values[0]))
            model.set_output_embeddings(head)
        read = {"input_ids": tokens} if given is None else embedded(model, tokens, *given, n_deep=source.n_deep)
        sees = seeing_ahead(tokens >= given[0]) if given is not None and source.sees_ahead else nullcontext()
        if given is not None and source.is_turned and grid is not None:
            positions = torch.stack([positions_of(is_row, [grid]) for is_row in tokens >= given[0]], dim=1)
        with run_by_transformers(source, hint="--verify off compiles without the comparison"), sees:
            logits = model(**read, position_ids=positions, use_cache=False).logits
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

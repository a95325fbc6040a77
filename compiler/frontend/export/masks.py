"""Masks of attention that goes through transformers' interface: in the exported graph, until they are worked out.

transformers makes a mask of functions of two indices, and a model may change it, or make one of its own.  Attention is
exported as causal, within its layer's window, or as an encoder's.  So whatever arrives at it as its mask goes into the
graph as one more operand, is worked out as those of .onnx files are (graph/causal_mask.py), and has to be exactly what
attention was given; of an encoder's it says how far a token sees on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from llmc.compiler.graph import attribute
from llmc.compiler.graph.causal_mask import (
    LONGEST,
    SHORT,
    ancestors,
    enough_tokens,
    evaluated,
    in_sight,
    numbers_in,
    window_of,
)
from llmc.compiler.weights import Array
from llmc.runtime.errors import LlmcError

PLACES = {"Attention": 3, "SinkAttention": 4}
"""The index of the mask among the operands of an exported node."""


def exported_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., torch.Tensor],
    **_: Any,
) -> torch.Tensor:
    """What transformers asks of an attention's masks: bool [batch_size, 1, q_length, kv_length], true where a key
    counts."""
    batch, head = torch.arange(batch_size)[:, None, None, None], torch.arange(1)[None, :, None, None]
    rows = (torch.arange(q_length) + q_offset)[None, None, :, None]
    columns = (torch.arange(kv_length) + kv_offset)[None, None, None, :]
    return mask_function(batch, head, rows, columns).expand(batch_size, 1, q_length, kv_length)


def drop_masks(graph: ir.Graph, n_context: int) -> None:
    """Drop the masks of attentions, after checking that each hides just what the attention itself hides.  n_context:
    the most tokens of a sequence, 0 where nobody says.  Raises LlmcError for any other mask."""
    checked: set[tuple[ir.Value, int]] = set()
    windows: dict[ir.Value, int] = {}
    for node in graph:
        index = PLACES.get(node.op_type, len(node.inputs))
        mask = node.inputs[index] if index < len(node.inputs) else None
        if mask is None:
            continue
        window, place = int(node.metadata_props["llmc.window"]), f"node {node.name}"
        if node.op_type == "Attention" and not attribute(node, "is_causal", 0):
            if mask not in windows:
                counts = worked_out(mask, n_context or LONGEST, place)
                enough_tokens(mask, (), n_context or LONGEST, place)
                windows[mask] = window_of(counts, place)
            node.metadata_props["llmc.window"] = str(windows[mask])
        elif (mask, window) not in checked:
            two_chunks = 2 - 2 * min(window, 0)
            check_mask(worked_out(mask, n_context or LONGEST, place, two_chunks), window, place)
            checked.add((mask, window))
        node.resize_inputs(index)


def worked_out(mask: ir.Value, n_context: int, place: str, least: int = SHORT) -> Array:
    """bool [n, n], which keys count, for as many tokens as show every window, and `least`; at most LONGEST."""
    made_of = ancestors(mask, ())
    if any(value.is_initializer() and value.const_value is None for value in made_of):
        raise LlmcError("its attention's mask depends on the tokens, not on their positions alone", place=place)
    n_tokens = min(n_context, LONGEST, max(SHORT, least, *(number + 2 for number in numbers_in(mask, (), n_context))))
    try:
        return evaluated(mask, None, (), n_tokens, place)
    except LlmcError as error:
        raise LlmcError(f"its attention's mask is not causal: {error.fact}", place=place) from error


def check_mask(counts: Array, window: int, place: str) -> None:
    """Refuse a mask under which other keys count than the last `window` (0: all; -n: of its chunk of n) up to a
    token's own."""
    expected = in_sight(len(counts), window)
    if (counts == expected).all():
        return
    row, column = (int(index) for index in np.argwhere(counts != expected)[0])
    says, given = ("counts", "does not") if counts[row, column] else ("does not count", "does")
    within = f"its chunks of {-window}" if window < 0 else f"its window of {window}" if window else "causal attention"
    fact = (
        f"its attention's mask is another than {within}: for token {row} the key {column} {says}, and there it {given}"
    )
    raise LlmcError(fact, place=place)

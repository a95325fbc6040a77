"""Models that number their tokens themselves if they are given no positions, and do not begin at 0."""

from __future__ import annotations

import sys

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

COUNTING = "create_position_ids_from_input_ids"
"""The name in transformers of functions that do so."""
FIRST_POSITION = "llmc.first_position"
"""In a graph's metadata: what the model calls the first token's position, where that is not 0."""


def first_position(model: PreTrainedModel) -> int:
    """The position that the model gives a text's first token if it is given none: in RoBERTa the one behind the number
    of the token that pads texts, in most models 0."""
    for module in model.modules():
        count = getattr(module, COUNTING, None) or getattr(sys.modules[type(module).__module__], COUNTING, None)
        padding = getattr(module, "padding_idx", None)
        if count is not None and padding is not None and hasattr(module, "position_embeddings"):
            return int(count(torch.full((1, 1), padding + 1), padding)[0, 0])
    return 0


def shift_positions(model: ir.Model, first: int) -> None:
    """Number tokens from `first`, where position_ids does from 0."""
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    start = ir.Value(name="first_position", const_value=ir.tensor(np.array(first), name="first_position"))
    model.graph.register_initializer(start)
    shifted = ir.Value(name="positions_from_first", shape=positions.shape, type=positions.type)
    add = ir.node("Add", [positions, start], outputs=[shifted], name="number_from_first")
    for use in positions.uses():
        if use.node is not add and use.node.op_type != "Shape":  # how many they are stays a size
            use.node.replace_input_with(use.idx, shifted)
    model.graph.insert_before(model.graph[0], add)
    model.metadata_props[FIRST_POSITION] = str(first)

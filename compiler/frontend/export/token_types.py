"""Models that tell types of tokens apart: those of the first text of a pair, and those of the second.

The only thing that a step says of a token is its number.  So that has to say the type too: with V tokens, token i of
type t is given as i + t V, and the graph takes it apart again.
"""

from __future__ import annotations

from inspect import signature

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from llmc.compiler.frontend.embedding import N_TYPES

TYPES = "token_type_ids"
"""What transformers calls them."""


def n_token_types(model: PreTrainedModel) -> int:
    """How many types of tokens the model tells apart; 1 if it has no types."""
    n_types = getattr(model.config, "type_vocab_size", 1)
    return n_types if isinstance(n_types, int) and TYPES in signature(model.forward).parameters else 1


def separate_types(model: ir.Model, n_tokens: int, n_types: int) -> None:
    """Take the types out of `input_ids`, rather than from an input of their own.  In place."""
    graph = model.graph
    ids, types = (next(value for value in graph.inputs if value.name == name) for name in ("input_ids", TYPES))
    count = ir.Value(name="n_tokens", const_value=ir.tensor(np.array(n_tokens), name="n_tokens"))
    graph.register_initializer(count)
    numbers, kinds = (ir.Value(name=name, shape=ids.shape, type=ids.type) for name in ("token", "token_type"))
    nodes = [
        ir.node("Mod", [ids, count], outputs=[numbers], name="token_of"),
        ir.node("Div", [ids, count], outputs=[kinds], name="type_of"),
    ]
    for old, new in ((ids, numbers), (types, kinds)):
        for use in old.uses():
            if use.node not in nodes:
                use.node.replace_input_with(use.idx, ids if use.node.op_type == "Shape" else new)
    graph.insert_before(graph[0], nodes)
    graph.inputs.remove(types)
    model.metadata_props[N_TYPES] = str(n_types)

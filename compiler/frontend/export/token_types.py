"""Models whose tokens are of types: of the first text of a pair, or of the second.

A step has tokens, and nothing else that could say of which type they are.  So a token's number says that too: where
there are V of them, token i of type t is given as i + t V, and the graph takes both from it.
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
    """How many the model tells from each other; 1, where it looks at none."""
    n_types = getattr(model.config, "type_vocab_size", 1)
    return n_types if isinstance(n_types, int) and TYPES in signature(model.forward).parameters else 1


def separate_types(model: ir.Model, n_tokens: int, n_types: int) -> None:
    """Let `input_ids` say the types too, in place of an input for these.  In place."""
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

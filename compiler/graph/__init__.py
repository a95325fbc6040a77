"""The graph: an `onnx_ir.Model` in float32, weights as initializers; and what is asked of it and done with it.

    ask      how nodes and values stand to each other             edit     nodes put in, values replaced
    shapes   of results, from those of inputs                     text     the graph to be read
    check    what a step graph is                                 run      in ONNX Runtime, whole
    probe    what follows from sizes alone                        stream   in ONNX Runtime, a node at a time
    causal_mask   whether a mask is the causal one

What most who work on a graph need is handed on here.
"""

from llmc.compiler.graph.ask import (
    attribute,
    bind,
    constant,
    count_ops,
    is_experts,
    is_last_axis,
    is_linear,
    number,
    producer,
    products_before,
    products_of_logits,
    used_once,
    values,
    weight_of,
)
from llmc.compiler.graph.check import check_step_graph, check_tower_graph
from llmc.compiler.graph.edit import (
    add_constant,
    clone,
    emit,
    family_name,
    ints_constant,
    name_results,
    number_values,
    prune,
    replace,
    same_tensor,
    shared_start,
    unused_name,
)
from llmc.compiler.graph.run import dump_stage, evaluate, runner, save_onnx
from llmc.compiler.graph.text import op_name, to_text

__all__ = [
    "add_constant",
    "attribute",
    "bind",
    "check_step_graph",
    "check_tower_graph",
    "clone",
    "constant",
    "count_ops",
    "dump_stage",
    "emit",
    "evaluate",
    "family_name",
    "ints_constant",
    "is_experts",
    "is_last_axis",
    "is_linear",
    "name_results",
    "number",
    "number_values",
    "op_name",
    "producer",
    "products_before",
    "products_of_logits",
    "prune",
    "replace",
    "runner",
    "same_tensor",
    "save_onnx",
    "shared_start",
    "to_text",
    "unused_name",
    "used_once",
    "values",
    "weight_of",
]

"""Look rows of a table up in the layout that a product has of it as its weight, so that the file holds it once.

rewrite:
    Gather(W, index, axis=0),  llmc.Linear…(x, W, …)
    -->
    llmc.WeightRows(W, index), llmc.Linear…(x, W, …)

    Gather(W, index, axis=0),  llmc.Linear…(x, W.int8, …)
    -->
    llmc.WeightRows(W.int8, index), llmc.Linear…(x, W.int8, …)
refuses: a table that is no product's weight, or only a gated product's, whose rows alternate with others; one that
products have in codes other than int8, whose coarseness the whole model would see, or in two forms; rows along another
axis; rows of an odd number of elements, or of int8 codes of no multiple of 4: a word of a panel holds two, or four.

For CPUs, of models whose embedding also makes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, op_name, replace, weight_of
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.compiler.weights import Weight

ELEMENTS_OF_A_WORD = {"f32": 1, "bf16": 2, "i8": 4}
"""By dtype: of the words that `schedules/cpu/gather.py` takes out of panels."""


def share_table(model: ir.Model) -> int:
    """Assumes a step graph, quantised if it is to be; leaves no lookup in a weight of a product.  Returns the number of
    lookups that changed."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) != "Gather" or attribute(node, "axis", 0) != 0:
            continue
        table, index = node.inputs
        found = as_multiplied(model.graph, table)
        if found is None:
            continue
        replace(node.outputs[0], emit(node, "llmc.WeightRows", [found, index])[0])
        if table is not None and not table.uses() and not table.is_graph_output():
            model.graph.initializers.pop(str(table.name), None)
        n_rewrites += 1
    return n_rewrites


def as_multiplied(graph: ir.Graph, table: ir.Value | None) -> ir.Value | None:
    """The one form in which products have the table, if rows can be taken out of that."""
    weight = weight_of(table)
    if weight is None or len(weight.dims) != 2:
        return None
    found = {value for value in multiplied_weights(graph) if value is table or is_made_of(value, weight)}
    if len(found) != 1:
        return None
    (value,) = found
    multiplied = weight_of(value)
    size = ELEMENTS_OF_A_WORD.get(multiplied.stored_dtype) if multiplied is not None else None
    return value if size is not None and weight.dims[1] % size == 0 else None


def multiplied_weights(graph: ir.Graph) -> Iterator[ir.Value]:
    """Weights of linear layers whose rows lie in their order."""
    for node in graph:
        if op_name(node).startswith("llmc.Linear") and node.inputs[1] is not None:
            yield node.inputs[1]


def is_made_of(value: ir.Value, weight: Weight) -> bool:
    """Whether these are codes for that weight."""
    codes = value.const_value
    return isinstance(codes, QuantizedWeight) and codes.source is weight

"""Store a table of embeddings in int8, where a checkpoint keeps it as codes and linear layers are quantised.

rewrite:
    Gather(W, index, axis=0)
    -->
    llmc.WeightRows(W.int8, index)
refuses: a table that the checkpoint does not keep as codes; one that something else reads too, such as the product that
makes the logits; rows along another axis, or of a number of elements that is no multiple of 4.

For CPUs: an embedding of 128256 tokens of 4096 elements is 0.5 GB in int8, and 1 GB in bf16.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, op_name, replace, weight_of
from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.passes.share_table import ELEMENTS_OF_A_WORD


def quantize_table(model: ir.Model) -> int:
    """Assumes a step graph; leaves lookups in QuantizedWeights.  Returns the number of lookups that changed."""
    n_rewrites = 0
    for node in list(model.graph):
        if op_name(node) != "Gather" or attribute(node, "axis", 0) != 0:
            continue
        table, index = node.inputs
        weight = weight_of(table)
        if table is None or weight is None or weight.coded is None or len(table.uses()) > 1:
            continue
        if len(weight.dims) != 2 or weight.dims[1] % ELEMENTS_OF_A_WORD["i8"]:
            continue
        codes = QuantizedWeight(weight, Scheme(8))
        value = add_constant(model.graph, codes, str(codes.name))
        replace(node.outputs[0], emit(node, "llmc.WeightRows", [value, index])[0])
        model.graph.initializers.pop(str(table.name), None)
        n_rewrites += 1
    return n_rewrites

"""Let rows of numbers stand for tokens, in place of their embeddings.

rewrite:
    llmc.Embedded(x)
    -->
    llmc.TakeGiven(x, is_given, given)

    llmc.Embedded(x), llmc.Deepened(y, part)                           of rows that go into later layers too
    -->
    llmc.TakeFirst(x, is_given, given), llmc.AddGiven(y, is_given, given, part)
refuses: embeddings, or results of such layers, that something else reads too: it would not see what is given; a graph
without any, and one with several of different sizes.

`is_given` says for each token whether row of `given` stands for it.  Where a model has its embeddings, with a scale or
not, its exporter has marked: there transformers takes `inputs_embeds`.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import emit, op_name, replace
from llmc.compiler.graph.shapes import attributes_of, dims
from llmc.compiler.ops import ADD_GIVEN, DEEPENED, DOMAIN, EMBEDDED, TAKE_FIRST, TAKE_GIVEN
from llmc.runtime.errors import LlmcError

M = ir.SymbolicDim("M")
TAKEN = {f"{DOMAIN}.{EMBEDDED}": "the tokens' embeddings", f"{DOMAIN}.{DEEPENED}": "what a layer makes"}
"""Marks, and of what."""


def take_given(model: ir.Model) -> int:
    """Assumes Embedded nodes over M tokens, perhaps Deepened ones; leaves TakeGiven nodes, or TakeFirst and AddGiven,
    and the inputs `is_given` i64[M] and `given` f32[M, K], K being the size of all parts. Returns their number."""
    graph = model.graph
    if any(value.name == "given" for value in graph.inputs):
        return 0
    marks = [node for node in graph if op_name(node) in TAKEN]
    sizes = {dims(node.outputs[0])[-1] for node in marks}
    if len(sizes) != 1:
        raise LlmcError(f"take_given: the tokens have embeddings of {len(sizes)} sizes", place="graph")
    (size,) = sizes
    assert isinstance(size, int)
    n_parts = 1 + sum(node.op_type == DEEPENED for node in marks)
    is_given = ir.Value(name="is_given", shape=ir.Shape([M]), type=ir.TensorType(ir.DataType.INT64))
    given = ir.Value(name="given", shape=ir.Shape([M, n_parts * size]), type=ir.TensorType(ir.DataType.FLOAT))
    for node in marks:
        x = node.inputs[0]
        assert x is not None
        if len(x.uses()) > 1 or x.is_graph_input() or x.is_graph_output():
            raise LlmcError(f"take_given: something else reads {TAKEN[op_name(node)]} too", place=f"node {node.name}")
        op = ADD_GIVEN if node.op_type == DEEPENED else TAKE_GIVEN if n_parts == 1 else TAKE_FIRST
        replace(node.outputs[0], emit(node, f"{DOMAIN}.{op}", [x, is_given, given], **attributes_of(node))[0])
    graph.inputs.extend([is_given, given])
    return len(marks)

"""Write routers that choose experts one after the other, hiding those already chosen, in the operators others use.

rewrite:
    ArgMax(s, axis=-1, keepdims=1)
    -->
    TopK(s, 1).indices

    ScatterElements(s, best, c, axis=-1)                                 best [batch·sequence, 1], c one number
    -->
    Where(Equal(best, [0, 1, …, E-1]), c, s)
refuses: several places at once, sums with what is there, the last of equal elements.

Phi 3.5's mixture chooses its two experts so: the share of the second is its softmax among all but the first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, attribute, emit, ints_constant, is_last_axis, prune, replace
from llmc.compiler.graph.shapes import dims
from llmc.passes.form_groups import filled_with


def form_choice(model: ir.Model) -> int:
    """Assumes the exported graph, with shapes, after form_groups; leaves operators that keep tokens apart.  Returns the
    number of rewrites."""
    n_rewrites = 0
    for node in list(model.graph):
        written = {"ArgMax": best_of, "ScatterElements": hidden}.get(node.op_type, lambda _: None)(node)
        if written is not None:
            replace(node.outputs[0], written)
            n_rewrites += 1
    prune(reversed(model.graph))
    return n_rewrites


def best_of(node: ir.Node) -> ir.Value | None:
    """The index of the largest element of the last axis; of the first where several are."""
    if not is_last_axis(node, attribute(node, "axis", 0)) or not attribute(node, "keepdims", 1):
        return None
    if attribute(node, "select_last_index", 0) or not isinstance(node.graph, ir.Graph):
        return None
    one = ints_constant(node.graph, [1])
    return emit(node, "TopK", [node.inputs[0], one], n_results=2, axis=-1, largest=1, sorted=1)[1]


def hidden(node: ir.Node) -> ir.Value | None:
    """The scores with a number in one place of each row."""
    scores, index, updates = node.inputs
    number, size = filled_with(updates), dims(scores)[-1]
    sums = attribute(node, "reduction", "none") not in ("none", b"none")
    if number is None or sums or not isinstance(size, int) or not isinstance(node.graph, ir.Graph):
        return None
    if not is_last_axis(node, attribute(node, "axis", 0)) or dims(index) != (*dims(scores)[:-1], 1):
        return None
    places = add_constant(node.graph, np.arange(size, dtype=np.int64), f"places.{size}")
    fill = add_constant(node.graph, np.array(number, np.float32), f"fill.{number}")
    at = emit(node, "Equal", [index, places])[0]
    return emit(node, "Where", [at, fill, scores])[0]

"""Let each token's own adapter add to the products of linear layers.

rewrite:
    llmc.Linear{Bias}(x, W, …)
    -->
    llmc.LowRank(llmc.Linear{Bias}(x, W, …), x, adapters, A, B, sizes)

    llmc.GatedLinear{activation}{Bias}(x, [Wg; Wu], …)
    -->
    llmc.LowRankGated{activation}(llmc.Linear{Bias}(x, [Wg; Wu], …), x, adapters, A, B, sizes)
refuses: an adapter of what is no such product here: of experts, of what makes keys and values of a latent; of the
product that makes the logits.

`adapters` says for each token which one is its own, -1 for none.  A weight that adapters change not alone, but joined
with others, has what they add joined likewise (compiler/low_rank.py): a pass for each of its parts.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import (
    add_constant,
    emit,
    ints_constant,
    op_name,
    products_of_logits,
    replace,
    weight_of,
)
from llmc.compiler.low_rank import Added, Part, joined_factors, parts_of
from llmc.compiler.ops import DOMAIN, gated_linear_name, linear_name, low_rank_name
from llmc.compiler.ops.linear import GATES
from llmc.runtime.errors import LlmcError

ADAPTERS = "adapters"
M = ir.SymbolicDim("M")
MERGE = "merge this adapter into the weights: --adapter FOLDER, without a name"
PRODUCTS = {f"{DOMAIN}.{linear_name(bias)}": (bias, "") for bias in (False, True)} | {
    f"{DOMAIN}.{gated_linear_name(activation, bias)}": (bias, activation)
    for activation in GATES
    for bias in (False, True)
}
"""The products that there are then: whether they have a bias, and the activation of their gate."""


def insert_adapters(model: ir.Model, *, added: Added) -> int:
    """Assumes Linear and GatedLinear nodes over M tokens, none with an epilogue; leaves a LowRank node behind each that
    an adapter changes, and the input `adapters` i64[M]. Returns their number."""
    graph = model.graph
    if any(value.name == ADAPTERS for value in graph.inputs):
        return 0
    adapters = ir.Value(name=ADAPTERS, shape=ir.Shape([M]), type=ir.TensorType(ir.DataType.INT64))
    spared, met = products_of_logits(graph), set[str]()
    n_rewrites = 0
    for node in [node for node in graph if op_name(node) in PRODUCTS and node not in spared]:
        weight = weight_of(node.inputs[1])
        parts = parts_of(weight) if weight is not None else None
        if parts is not None and any(part.name in added for part in parts):
            insert(graph, node, adapters, parts, added)
            met |= {part.name for part in parts}
            n_rewrites += 1
    refuse_unmet(added, met, {str(weight.name) for node in spared if (weight := weight_of(node.inputs[1])) is not None})
    graph.inputs.append(adapters)
    return n_rewrites


def refuse_unmet(added: Added, met: set[str], of_logits: set[str]) -> None:
    """Raise LlmcError if adapters change a weight that was not met among those of products.  of_logits: the weights of
    the products that make the logits."""
    if missing := [name for name in added if name not in met]:
        what = "makes the logits" if missing[0] in of_logits else "is no linear layer of its own here"
        fact = f"an adapter that stays beside the weights cannot change {missing[0]}, which {what}"
        raise LlmcError(fact, place="--adapter NAME=FOLDER", hint=MERGE)


def insert(graph: ir.Graph, node: ir.Node, adapters: ir.Value, parts: list[Part], added: Added) -> None:
    """Put a product without a gate, and what adds to it and gates it, in the product's place."""
    bias, activation = PRODUCTS[op_name(node)]
    weight = weight_of(node.inputs[1])
    assert weight is not None
    factors = [add_constant(graph, each, str(each.name)) for each in joined_factors(weight, parts, added)]
    sizes = ints_constant(graph, [part.n_rows for part in parts])
    product = emit(node, f"{DOMAIN}.{linear_name(bias)}", list(node.inputs), like=node)[0]
    operands = [product, node.inputs[0], adapters, *factors, sizes]
    replace(node.outputs[0], emit(node, f"{DOMAIN}.{low_rank_name(activation)}", operands)[0])

"""Multiply a token's own matrices in the other order, where both lie transposed and so does the result.

rewrite:
    Transpose(MatMul(Transpose(x [M, N, K]), Transpose(c [M, S, N])))                      each with perm [0, 2, 1]
    -->
    MatMul(c, x)                                                                                       [M, S, K]
refuses: a product with another user; operands of which one lies as it is.

A model that keeps several streams for each token mixes them so (AltUp in Gemma 3n), and streams are long.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, producer, replace, used_once

SWAPPED = [0, 2, 1]


def swap_product(model: ir.Model) -> int:
    """Assumes and leaves a graph over M tokens.  Returns the number of products."""
    n_rewrites = 0
    for node in list(model.graph):
        product = producer(swapped(node.outputs[0]), "MatMul")
        if product is None or not used_once(product.outputs[0]):
            continue
        left, right = (swapped(value) for value in product.inputs)
        if left is not None and right is not None:
            replace(node.outputs[0], emit(node, "MatMul", [right, left])[0])
            n_rewrites += 1
    return n_rewrites


def swapped(value: ir.Value | None) -> ir.Value | None:
    """What the value is, its last two of three axes swapped."""
    node = producer(value, "Transpose")
    return node.inputs[0] if node is not None and list(attribute(node, "perm") or ()) == SWAPPED else None

"""Normalise queries and keys where they lie, beside their values, so that they never come apart.

rewrite:
    q, k, v = Split(qkv)
    llmc.{Rotary}PagedAttention(Concat(RMSNormalization(q, wq), RMSNormalization(k, wk), v), …)
    -->
    llmc.{Rotary}PagedAttention(llmc.QueryKeyRMSNorm(qkv, wq, wk), …)
refuses: a norm of less than all heads together (fuse_head_norm takes those of each head), or with another user;
queries normalised without keys, or the other way round, or with another epsilon; q, k and v of no one row.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, op_name, producer, replace, used_once
from llmc.compiler.graph.check import ATTENTION
from llmc.compiler.graph.shapes import dims
from llmc.passes.fuse_head_norm import epsilon_of


def fuse_query_key_norm(model: ir.Model) -> int:
    """Assumes paged attention after fuse_head_norm; leaves none whose queries and keys are cut out of a row to be
    normalised.  Returns the number of layers."""
    n_rewrites = 0
    for node in list(model.graph):
        whole = producer(node.inputs[0], "Concat") if op_name(node) in ATTENTION else None
        normed = normalised(whole) if whole is not None and used_once(whole.outputs[0]) else None
        if whole is not None and normed is not None:
            replace(whole.outputs[0], normed)
            n_rewrites += 1
    return n_rewrites


def normalised(whole: ir.Node) -> ir.Value | None:
    """What the Concat gives, of the row that its parts are cut from."""
    norms = [whole_norm(value) for value in whole.inputs[:2]]
    split = producer(whole.inputs[-1], "Split")
    found = [norm for norm in norms if norm is not None]
    if split is None or len(found) != 2 or epsilon_of(found[0]) != epsilon_of(found[1]):
        return None
    parts = [*(norm.inputs[0] for norm in found), *whole.inputs[2:]]
    if list(split.outputs) != parts or not is_last_axis(split, attribute(split, "axis", 0)):
        return None
    operands = [split.inputs[0], *(norm.inputs[1] for norm in found)]
    return emit(whole, "llmc.QueryKeyRMSNorm", operands, epsilon=epsilon_of(found[0]))[0]


def whole_norm(value: ir.Value | None) -> ir.Node | None:
    """The RMSNormalization of all of a row that made the value, for the one user it has."""
    norm = producer(value, "RMSNormalization")
    if norm is None or value is None or not used_once(value) or len(norm.inputs) != 2:
        return None
    weight = norm.inputs[1]
    fits = len(dims(value)) == 2 and dims(weight) == dims(value)[1:] and is_last_axis(norm, attribute(norm, "axis", -1))
    return norm if fits and constant(weight) is not None else None

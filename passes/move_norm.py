"""Normalise queries and keys before they are turned by their positions, which comes to the same.

rewrite:
    RMSNormalization(RotaryEmbedding(x, C, S), w)                         w: one number for all elements
    -->
    RotaryEmbedding(RMSNormalization(x, w), C, S)

    of heads [batch, sequence, heads, D], which are transposed around RotaryEmbedding, likewise
refuses: weights that differ; angles whose C² + S² is not 1 (YaRN's, scaled), which would be normalised away.

A rotation changes no sum of squares.  Attention does both, in this order (fuse_head_norm).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_last_axis, producer, replace, used_once
from llmc.compiler.graph.causal_mask import ancestors
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import attributes_of
from llmc.compiler.weights import Weight
from llmc.passes.tabulate_positions import at_positions

PLACES = 977 * np.arange(13)
"""Positions at which angles are checked."""


def move_norm(model: ir.Model) -> int:
    """Assumes the exported graph after fuse_rotary, before tables; leaves no norm of one weight behind a rotation.
    Returns the number of norms moved."""
    n_rewrites = 0
    unit: dict[tuple[ir.Value | None, ...], bool] = {}
    for node in list(model.graph):
        if node.op_type != "RMSNormalization" or not is_last_axis(node, attribute(node, "axis", -1)):
            continue
        turned = node.inputs[0]
        swap = producer(turned, "Transpose") if turned is not None and used_once(turned) else None
        rotary = producer(swap.inputs[0] if swap is not None else turned, "RotaryEmbedding")
        if rotary is None or not used_once(rotary.outputs[0]) or not is_even(node.inputs[1]):
            continue
        if swap is not None and list(attribute(swap, "perm") or ())[-1:] != [3]:
            continue
        waves = tuple(rotary.inputs[1:3])
        if waves not in unit:
            unit[waves] = are_unit(model.graph, waves)
        if not unit[waves]:
            continue
        x = emit(node, "RMSNormalization", [rotary.inputs[0], node.inputs[1]], like=node, **attributes_of(node))[0]
        result = emit(node, "RotaryEmbedding", [x, *waves], like=rotary, **attributes_of(rotary))[0]
        if swap is not None:
            result = emit(node, "Transpose", [result], perm=attribute(swap, "perm"))[0]
        replace(node.outputs[0], result)
        n_rewrites += 1
    return n_rewrites


def is_even(weight: ir.Value | None) -> bool:
    """Whether all elements are the same, known number."""
    tensor = constant(weight)
    return tensor is not None and not isinstance(tensor, Weight) and bool(np.ptp(tensor.numpy()) == 0)


def are_unit(graph: ir.Graph, waves: tuple[ir.Value | None, ...]) -> bool:
    """Whether C² + S² is 1 for cosines and sines that are made of positions: worked out at PLACES."""
    total: Any = 0.0
    for wave in waves:
        made_of = ancestors(wave, ()) if wave is not None else ()
        inputs = [value for value in graph.inputs if value.name in ("input_ids", "position_ids")]
        if wave is None or any(isinstance(v.const_value, Weight) for v in made_of):
            return False
        if any(value.is_graph_input() and value not in inputs for value in made_of):
            return False
        total = total + at_positions(runner(extract(wave, inputs)), PLACES) ** 2
    return bool(np.allclose(total, 1.0, rtol=0, atol=1e-5))

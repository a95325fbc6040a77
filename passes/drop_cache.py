"""Make a graph that is called step by step, with a mask and a cache, the plain function of a whole sequence.

rewrite:
    Concat(past_key_values.0.key, k), Cast(attention_mask)      inputs: input_ids, attention_mask, past_key_values.…
    -->
    Concat(Expand(nothing [1, KH, 0, D], …), k), Cast(Expand(1, Shape(input_ids)))      inputs: input_ids, position_ids
refuses: an input that is none of a causal decoder's.

The mask of padding is all ones, the past holds no token, and of the results only the logits are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import add_constant, ints_constant, prune, replace
from llmc.runtime.errors import LlmcError

KEPT = ("input_ids", "position_ids")
KNOWN = "input_ids, attention_mask, position_ids, cache_position and past_key_values.*"


def drop_cache(model: ir.Model) -> int:
    """Assumes an input `input_ids` and a result `logits`. Leaves inputs `input_ids` and `position_ids`
    [batch, sequence], the latter perhaps unused, and the result `logits`; shapes are resolve_shapes' to settle. Returns
    the number of inputs and results that changed."""
    graph = model.graph
    by_name = {str(value.name): value for value in graph.inputs}
    others = [value for name, value in by_name.items() if name not in KEPT]
    results = [value for value in graph.outputs if value.name != "logits"]
    n_changed = len(others) + len(results) + ("position_ids" not in by_name)
    graph.outputs[:] = [value for value in graph.outputs if value.name == "logits"]
    ids = by_name["input_ids"]
    for value in others:
        default = default_of(graph, value, ids)
        replace(value, default)
    positions = by_name.get("position_ids") or ir.Value(name="position_ids", type=ir.TensorType(ir.DataType.INT64))
    for value in (ids, positions):
        value.shape = ir.Shape(["batch", "sequence"])
    graph.inputs[:] = [ids, positions]
    prune(reversed(graph))
    return n_changed


def default_of(graph: ir.Graph, value: ir.Value, ids: ir.Value) -> ir.Value:
    """What the input holds for a sequence that begins here and is not padded."""
    name, shape = str(value.name), list(value.shape or ())
    first = graph[0]
    if name == "attention_mask" and len(shape) == 2:
        one = add_constant(graph, np.ones((), value.dtype.numpy() if value.dtype else np.int64), "mask.one")
        return made(first, "Expand", [one, made(first, "Shape", [ids])])
    if name == "cache_position" and len(shape) == 1:
        n_tokens = made(first, "Squeeze", [made(first, "Shape", [ids], start=1, end=2)])
        bounds = [add_constant(graph, np.array(number, np.int64), f"cache_position.{number}") for number in (0, 1)]
        return made(first, "Range", [bounds[0], n_tokens, bounds[1]])
    if is_past(value):
        sizes = [size if isinstance(size, int) else 0 for size in shape[1:]]
        nothing = add_constant(graph, np.zeros((1, *sizes), np.float32), f"past.{'_'.join(map(str, sizes))}")
        batch = made(first, "Shape", [ids], start=0, end=1)
        return made(first, "Expand", [nothing, made(first, "Concat", [batch, ints_constant(graph, sizes)], axis=0)])
    raise LlmcError(
        f"the graph has the input {name} of shape {value.shape}, which is none of a causal decoder's",
        place=f"input {name}",
        hint=f"it may have {KNOWN}",
    )


def made(before: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
    """A node in front of `before`; its shape is settled once all shapes are."""
    converted = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
    node = ir.Node("", op, inputs, converted)
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, node)
    return node.outputs[0]


def is_past(value: ir.Value) -> bool:
    """Whether an input holds earlier keys or values: [batch, heads, past, D], or [batch, past, heads, D]."""
    shape = list(value.shape or ())
    return len(shape) == 4 and "past" in str(value.name) and sum(isinstance(size, int) for size in shape[1:]) == 2

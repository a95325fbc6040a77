"""Biases by distance that a model looks up (T5's buckets, as MPNet has them): worked out, not recognised, as masks are.

A table has a row for each bucket, and which bucket a query and a key are in depends on how far they are apart.  What is
added to their scores in the end is a row of that table, a number for each head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llmc.compiler.graph import attribute, weight_of
from llmc.compiler.graph.causal_mask import LONGEST, SHORT, ancestors
from llmc.compiler.graph.run import extract, runner
from llmc.compiler.graph.shapes import dims
from llmc.compiler.kernel import PAGE_TOKENS
from llmc.compiler.weights import Array, Weight
from llmc.runtime.errors import LlmcError

OTHER = "the attention adds to its scores a bias that is looked up in a weight, and not by distance alone"


def looked_up(value: ir.Value | None) -> ir.Node | None:
    """The node that looks rows of a weight up, if the value […, heads, sequence, sequence] is made by one."""
    if value is None or [str(size) for size in dims(value)[-2:]] != ["sequence", "sequence"]:
        return None
    found = [node for each in ancestors(value, ()) if (node := each.producer()) is not None and is_lookup(node)]
    return found[0] if len(found) == 1 else None


def is_lookup(node: ir.Node) -> bool:
    """Whether it takes rows of a weight."""
    table = node.inputs[0]
    is_weight = table is not None and isinstance(table.const_value, Weight)
    return node.op_type == "Gather" and is_weight and attribute(node, "axis", 0) == 0


def read_distances(value: ir.Value, n_heads: int, n_context: int, place: str) -> Weight:
    """What is added to the score of a query and a key, as a table by head and distance: [n_heads, 2 C], where C is
    n_context in whole pages; a query and a key find theirs in column C + key - query.  Reads no weight.  Raises
    LlmcError for what is looked up otherwise.
    """
    node = looked_up(value)
    table = weight_of(node.inputs[0]) if node is not None else None
    if node is None or table is None or node.inputs[1] is None or table.dims[1:] != (n_heads,):
        raise LlmcError(OTHER, place=place)
    if n_context > LONGEST:
        fact = f"a bias by distance is worked out for up to {LONGEST} tokens, not {n_context}"
        raise LlmcError(fact, place=place, hint=f"ask for a --max-seq of at most {LONGEST}")
    if not is_passed_on(node.outputs[0], value):
        raise LlmcError(OTHER, place=place)
    bucket, n_few = buckets(node.inputs[1], n_context, place), min(SHORT, n_context)
    if (buckets(node.inputs[1], n_few, place) != bucket[n_context - n_few : n_context + n_few - 1]).any():
        raise LlmcError(OTHER, place=place)  # it depends on a text's length too
    reach = -(-n_context // PAGE_TOKENS) * PAGE_TOKENS
    made_of = ("distances", bucket.tobytes(), reach, table)

    def read() -> Array:
        found = np.zeros((n_heads, 2 * reach), np.float32)
        found[:, reach - n_context + 1 : reach + n_context] = table.unrounded()[bucket].T
        return found

    return Weight.computed(f"{table.name}[distances]", (n_heads, 2 * reach), read, made_of=made_of)


def is_passed_on(looked: ir.Value, value: ir.Value) -> bool:
    """Whether the value holds, head by head, just what the lookup [sequence, sequence, heads] gave: tried out with
    numbers."""
    if [str(size) for size in dims(looked)[:2]] != ["sequence", "sequence"]:
        return False
    numbers = np.random.default_rng(0).normal(size=(SHORT, SHORT, int(str(dims(looked)[2])))).astype(np.float32)
    found = numbers_of(value, looked, SHORT, {str(looked.name): numbers})
    wanted = numbers.transpose(2, 0, 1)
    return found.shape[-3:] == wanted.shape and bool((found == wanted).all())


def buckets(index: ir.Value, n_tokens: int, place: str) -> Array:
    """The table's row for each distance key - query from 1 - n_tokens to n_tokens - 1, [2 n_tokens - 1]."""
    found = numbers_of(index, None, n_tokens, {})
    if found.shape != (n_tokens, n_tokens):
        raise LlmcError(OTHER, place=place)
    by_distance = np.concatenate([found[:0:-1, 0], found[0]])
    rows = np.arange(n_tokens)
    if (found != by_distance[rows - rows[:, None] + n_tokens - 1]).any():
        raise LlmcError(OTHER, place=place)
    return by_distance


def numbers_of(value: ir.Value, cut: ir.Value | None, n_tokens: int, given: dict[str, Array]) -> Array:
    """What a value is for one sequence.  cut: values that are given, so that what makes them is not evaluated."""
    cuts = [cut] if cut is not None else []
    leaves = [each for each in ancestors(value, cuts) if each.is_graph_input()]
    feeds = {str(each.name): np.arange(n_tokens)[None] for each in leaves}
    return np.asarray(next(iter(runner(extract(value, [*leaves, *cuts]))({**feeds, **given}).values())))

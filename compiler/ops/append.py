"""A product that makes queries, keys and values, turns them and appends keys and values to the cache.

    {{Deferred}?{RMSNorm|LayerNorm}}? Linear{Bias}? {Rotary}? Append

Each is defined as the product and then step 1 of {Rotary}?PagedAttention; AppendedAttention is step 2.  When a product
ends its sums are in registers: turned, rounded and stored from there they are not read from memory again.
See __init__.py for what M, H, KH and D are.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.attention_parts import (
    FLOATS,
    SIZES,
    STEP_INPUTS,
    TURNING,
    append_step,
    split_heads,
)
from llmc.compiler.ops.deferred_norm import deferred_name
from llmc.compiler.ops.define import ATTRIBUTE_TYPES, OPERATORS, define
from llmc.compiler.ops.linear import NORMS, linear_name, normed_name
from llmc.compiler.ops.paged import attention_results
from llmc.compiler.ops.rotary import turn


def append_name(product: str, rotary: bool) -> str:
    """`LinearAppend`, `RMSNormLinearRotaryAppend`, …: of a product's name."""
    return f"{product}{'Rotary' * rotary}Append"


def appended_parts(name: str) -> tuple[str, bool] | None:
    """(product, rotary) of an operator of this family; None for any other."""
    return APPENDING.get(name)


def define_append(product: str, rotary: bool) -> None:
    plain = OPERATORS[product]
    n_inputs = len(plain.inputs)
    attributes = (*plain.attributes, *SIZES, "layer", *TURNING * rotary)

    def body(op: Any, *inputs: ir.Value, **settings: Any) -> Any:
        qkv = plain.body(op, *inputs[:n_inputs], **{name: settings[name] for name in plain.attributes})
        positions, page_table, k_cache, v_cache = inputs[-4:]
        sizes = num_heads, kv_num_heads, _ = tuple(settings[name] for name in SIZES)
        q, k, v = split_heads(op, qkv, v_cache, sizes)
        if rotary:
            cos, sin = inputs[n_inputs : n_inputs + 2]
            q, k = turn(op, q, k, cos, sin, (num_heads, kv_num_heads), *(settings[name] for name in TURNING))
        return q, *append_step(op, k, v, positions, page_table, k_cache, v_cache, sizes)

    define(
        append_name(product, rotary),
        [*plain.inputs, *["cos", "sin"] * rotary, *STEP_INPUTS],
        {name: ATTRIBUTE_TYPES["float" if name in FLOATS else "int"] for name in attributes},
        body,
        attention_results,
        f"{product}, {'then Rotary of queries and keys, ' * rotary}then step 1 of PagedAttention.    N = (H + 2 KH)·D "
        f"-> queries [M, H·D], both caches.    {plain.function.graph.doc_string}",
    )


NORMED = [normed_name(norm, linear_name(bias)) for norm, bias in product(NORMS, (False, True))]
PRODUCTS = [linear_name(False), linear_name(True), *NORMED, *map(deferred_name, NORMED)]
APPENDING = {append_name(*parts): parts for parts in product(PRODUCTS, (False, True))}
for _parts in APPENDING.values():
    define_append(*_parts)

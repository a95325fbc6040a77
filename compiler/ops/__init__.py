"""The operators that llmc adds to ONNX: domain `llmc`, version 1.

Each is an ONNX function whose body, in standard operators of opset 23, *is* its definition: ONNX Runtime runs it, the
passes rewrite towards it, and kernels are tested against it. A definition below is a Python function that is traced
once. Its positional parameters are the operator's inputs, its keyword-only ones the attributes, its docstring says the
equation and the shapes. In them M is the number of tokens in a step, R of rows whose logits are wanted, P of page-table
entries a row; H and KH count query and key heads of D elements; N and K are the sides of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.append import append_name, appended_parts
from llmc.compiler.ops.attention import CAUSAL_ATTENTION, SEQUENCE_ATTENTION, WHOLE_ATTENTION
from llmc.compiler.ops.deferred_norm import deferred_name, moments_name
from llmc.compiler.ops.define import (
    DOMAIN,
    OPERATORS,
    OPSET,
    VERSION,
    Attributes,
    Dims,
    Operator,
    function_of,
    like_first,
    operator,
)
from llmc.compiler.ops.experts import (
    CLAMP,
    CLAMPED_EXPERTS,
    EXPERTS,
    RESIDUAL_CLAMPED_EXPERTS,
    RESIDUAL_EXPERTS,
    clamped_experts_name,
    experts_name,
)
from llmc.compiler.ops.gather import GATHERS, MOST_TABLES, gathers_name
from llmc.compiler.ops.latent import LATENT_ATTENTION
from llmc.compiler.ops.linear import (
    gated_linear_name,
    linear_name,
    linear_parts,
    normed_name,
    normed_parts,
)
from llmc.compiler.ops.paged import (
    APPENDED_ATTENTION,
    DISTANCE_PAGED_ATTENTION,
    PAGED_ATTENTION,
    WHOLE_PAGED_ATTENTION,
    appended_attention_name,
    paged_attention_name,
)
from llmc.compiler.ops.pool import POOLS
from llmc.compiler.ops.routing import GROUPS, ROUTERS, KeepGroups, router_fits, router_name
from llmc.compiler.ops.states import (
    CAUSAL_CONV,
    GATED_RULES,
    PLACE,
    SELECTIVE_SCAN,
    STATEFUL,
    WITH_STATES,
    conv_name,
)

__all__ = [
    "APPENDED_ATTENTION",
    "CAUSAL_ATTENTION",
    "CAUSAL_CONV",
    "CLAMP",
    "CLAMPED_EXPERTS",
    "DISTANCE_PAGED_ATTENTION",
    "DOMAIN",
    "EXPERTS",
    "GATED_RULES",
    "GATHERS",
    "GROUPS",
    "LATENT_ATTENTION",
    "MOST_TABLES",
    "OPERATORS",
    "OPSET",
    "PAGED_ATTENTION",
    "PLACE",
    "POOLS",
    "RESIDUAL_CLAMPED_EXPERTS",
    "RESIDUAL_EXPERTS",
    "ROUTERS",
    "SELECTIVE_SCAN",
    "SEQUENCE_ATTENTION",
    "STATEFUL",
    "VERSION",
    "WHOLE_ATTENTION",
    "WHOLE_PAGED_ATTENTION",
    "WITH_STATES",
    "KeepGroups",
    "Operator",
    "append_name",
    "appended_attention_name",
    "appended_parts",
    "clamped_experts_name",
    "conv_name",
    "deferred_name",
    "experts_name",
    "function_of",
    "gated_linear_name",
    "gathers_name",
    "linear_name",
    "linear_parts",
    "moments_name",
    "normed_name",
    "normed_parts",
    "paged_attention_name",
    "router_fits",
    "router_name",
]


# -- activations and norms -----------------------------------------------------------------------------------------


def two_like_first(shapes: Sequence[Dims], _: Attributes) -> Sequence[Dims]:
    return [shapes[0], shapes[0]]


@operator(like_first)
def Silu(op: Any, x: ir.Value) -> Any:
    """x · sigmoid(x).    x any shape.    Elfwing et al. 2017, arXiv:1702.03118."""
    return op.Mul(x, op.Sigmoid(x))


@operator(two_like_first)
def AddRMSNorm(op: Any, x: ir.Value, residual: ir.Value, weight: ir.Value, *, epsilon: float) -> Any:
    """sum = x + residual; normed = sum / sqrt(mean(sum²) + epsilon) · weight.

    x, residual [M, K], weight [K] -> sum, normed [M, K].    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    total = op.Add(x, residual)
    return total, op.RMSNormalization(total, weight, axis=-1, epsilon=epsilon)


@operator(two_like_first)
def AddLayerNorm(op: Any, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, *, epsilon: float) -> Any:
    """sum = x + residual; normed = (sum - mean(sum)) / sqrt(var(sum) + epsilon) · weight + bias.

    x, residual [M, K], weight, bias [K] -> sum, normed [M, K].    Ba et al. 2016, arXiv:1607.06450.
    """
    total = op.Add(x, residual)
    return total, op.LayerNormalization(total, weight, bias, axis=-1, epsilon=epsilon)


@operator(like_first)
def GatedRMSNorm(op: Any, x: ir.Value, z: ir.Value, weight: ir.Value, *, epsilon: float) -> Any:
    """RMSNorm(x) · silu(z), silu(z) = z · sigmoid(z).    x, z [M, …, K], weight [K] -> like x."""
    normed = op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon)
    return op.Mul(normed, op.Mul(z, op.Sigmoid(z)))


@operator(like_first)
def QueryKeyRMSNorm(op: Any, qkv: ir.Value, query_norm: ir.Value, key_norm: ir.Value, *, epsilon: float) -> Any:
    """The first A columns of each row, and the next B, by RMSNorm over all of them; the rest as it is.

    qkv [M, C], query_norm [A], key_norm [B] -> like qkv.    As OLMo 2 has it: all heads together.
    """
    queries, keys = op.Shape(query_norm), op.Shape(key_norm)
    values = op.Sub(op.Shape(qkv, start=1), op.Add(queries, keys))
    q, k, v = op.Split(qkv, op.Concat(queries, keys, values, axis=0), axis=1, n_results=3)
    normed = (op.RMSNormalization(x, w, axis=-1, epsilon=epsilon) for x, w in ((q, query_norm), (k, key_norm)))
    return op.Concat(*normed, v, axis=1)

"""The operators that llmc adds to ONNX: domain `llmc`, version 1.

Each is an ONNX function whose body, in standard operators of opset 23, *is* its definition: ONNX Runtime runs it, the
passes rewrite towards it, and kernels are tested against it. A definition is a Python function that is traced once
(define.py). Its positional parameters are the operator's inputs, its keyword-only ones the attributes, its docstring
says the equation and the shapes. In them M is the number of tokens in a step, R of rows whose logits are wanted, P of
page-table entries a row; H and KH count query and key heads of D elements; N and K are the sides of a weight.
"""

from __future__ import annotations

from llmc.compiler.ops.append import append_name, appended_parts
from llmc.compiler.ops.attention import CAUSAL_ATTENTION, SEQUENCE_ATTENTION, WHOLE_ATTENTION
from llmc.compiler.ops.deep import ADD_GIVEN, DEEP, DEEPENED, TAKE_FIRST
from llmc.compiler.ops.deferred_norm import deferred_name, moments_name
from llmc.compiler.ops.define import (
    DOMAIN,
    OPERATORS,
    OPSET,
    VERSION,
    Operator,
    function_of,
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
from llmc.compiler.ops.given import EMBEDDED, IN_WINDOWS, OF_PATCHES, SEES_AHEAD, SIZED, TAKE_GIVEN, window_name
from llmc.compiler.ops.latent import LATENT_ATTENTION
from llmc.compiler.ops.linear import (
    gated_linear_name,
    linear_name,
    linear_parts,
    normed_name,
    normed_parts,
    strips_name,
)
from llmc.compiler.ops.low_rank import LOW_RANK, LOW_RANKS, low_rank_name
from llmc.compiler.ops.norm import AddLayerNorm, AddRMSNorm, GatedRMSNorm, QueryKeyRMSNorm, Silu
from llmc.compiler.ops.paged import (
    AHEAD_PAGED_ATTENTION,
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
    CHANNEL_DELTA,
    GATED_DELTA,
    GATED_RULES,
    PLACE,
    SELECTIVE_SCAN,
    STATEFUL,
    WITH_STATES,
    conv_name,
    rule_name,
)
from llmc.compiler.ops.turned import GATHER_TURNED, N_TURNS, TURNED

__all__ = [
    "ADD_GIVEN",
    "AHEAD_PAGED_ATTENTION",
    "APPENDED_ATTENTION",
    "CAUSAL_ATTENTION",
    "CAUSAL_CONV",
    "CHANNEL_DELTA",
    "CLAMP",
    "CLAMPED_EXPERTS",
    "DEEP",
    "DEEPENED",
    "DISTANCE_PAGED_ATTENTION",
    "DOMAIN",
    "EMBEDDED",
    "EXPERTS",
    "GATED_DELTA",
    "GATED_RULES",
    "GATHERS",
    "GATHER_TURNED",
    "GROUPS",
    "IN_WINDOWS",
    "LATENT_ATTENTION",
    "LOW_RANK",
    "LOW_RANKS",
    "MOST_TABLES",
    "N_TURNS",
    "OF_PATCHES",
    "OPERATORS",
    "OPSET",
    "PAGED_ATTENTION",
    "PLACE",
    "POOLS",
    "RESIDUAL_CLAMPED_EXPERTS",
    "RESIDUAL_EXPERTS",
    "ROUTERS",
    "SEES_AHEAD",
    "SELECTIVE_SCAN",
    "SEQUENCE_ATTENTION",
    "SIZED",
    "STATEFUL",
    "TAKE_FIRST",
    "TAKE_GIVEN",
    "TURNED",
    "VERSION",
    "WHOLE_ATTENTION",
    "WHOLE_PAGED_ATTENTION",
    "WITH_STATES",
    "AddLayerNorm",
    "AddRMSNorm",
    "GatedRMSNorm",
    "KeepGroups",
    "Operator",
    "QueryKeyRMSNorm",
    "Silu",
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
    "low_rank_name",
    "moments_name",
    "normed_name",
    "normed_parts",
    "paged_attention_name",
    "router_fits",
    "router_name",
    "rule_name",
    "strips_name",
    "window_name",
]

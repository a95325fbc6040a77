"""Layers with a state in the exported graph: each convolution, each delta rule and each scan is one node.

transformers' modules call functions of their own module for these, under one name in all architectures, so that faster
kernels can take their place; while a model is traced, ours do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from llmc.compiler.frontend.export.unsupported import unsupported
from llmc.compiler.ops import (
    CAUSAL_CONV,
    CHANNEL_DELTA,
    DOMAIN,
    GATED_DELTA,
    GATED_RULES,
    SELECTIVE_SCAN,
    VERSION,
    conv_name,
    rule_name,
)

SCANS = (*GATED_RULES, SELECTIVE_SCAN)
KINDS = {"linear_attention": SCANS, "hybrid": SCANS, "conv": CAUSAL_CONV, "mlp": (), "moe": ()}
"""Kinds of layers that are compiled besides those of attention alone, and the operator that each has once."""
WITH_ATTENTION = ("hybrid",)
"""Those kinds of layers that attend too."""
EPSILON = 1e-6
"""What transformers' delta rule adds to a vector's square."""


class UnknownError(Exception):
    """A layer's state is asked for in a way that no node has."""


@contextmanager
def as_nodes(model: PreTrainedModel) -> Iterator[None]:
    """While it is active, the model's module calls functions that make nodes."""
    module = sys.modules[type(model).__module__]
    own = {name: getattr(module, name) for name in NODES if hasattr(module, name)}
    try:
        for name in own:
            setattr(module, name, NODES[name])
        yield
    except UnknownError as error:
        raise unsupported(model.config, str(error)) from error
    finally:
        for name, function in own.items():
            setattr(module, name, function)


def count_without_attention(config: PretrainedConfig, kinds: list[str], graph: ir.Graph) -> int:
    """The number of layers that do not attend.  Refuses a model whose layers with a state did not all become nodes."""
    for names in dict.fromkeys(filter(None, KINDS.values())):
        n_layers = sum(KINDS.get(kind) == names for kind in kinds)
        n_nodes = sum(node.op_type in names for node in graph)
        if n_layers and n_nodes != n_layers:
            reason = f"{n_nodes} of its {n_layers} layers with a state go through transformers' functions for them"
            raise unsupported(config, reason)
    return sum(kind in KINDS and kind not in WITH_ATTENTION for kind in kinds)


def _conv_node(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor:
    """hidden_states [B, C, S], weight [C, L], bias [C] -> [B, C, S], as one graph node."""
    _only_known(others)
    is_silu = activation is not None and type(ACT2FN[activation]) is type(ACT2FN["silu"])
    x = hidden_states.permute(2, 0, 1)
    y: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{conv_name(bias is not None)}",
        (x, weight, *([] if bias is None else [bias])),
        {"silu": int(is_silu)},
        dtype=x.dtype,
        shape=x.shape,
        version=VERSION,
    )
    y = y.permute(1, 2, 0)
    return y if is_silu or activation is None else ACT2FN[activation](y)


def _delta_rule_node(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query, key [B, S, KH, DK], value [B, S, VH, DV], beta [B, S, VH], g like it, or for each of the key's elements
    [B, S, VH, DK] (Kimi Linear) -> [B, S, VH, DV], as one graph node."""
    _only_known(others)
    if not use_qk_l2norm_in_kernel:
        raise UnknownError("its delta rule takes queries and keys that are not normalised")
    operands = [x.transpose(0, 1) for x in (query, key, value, g, beta)]
    y = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{rule_name(CHANNEL_DELTA if g.dim() == query.dim() else GATED_DELTA)}",
        operands,
        {"scale": float(query.shape[-1] ** -0.5), "epsilon": EPSILON},
        dtype=value.dtype,
        shape=operands[2].shape,
        version=VERSION,
    )
    return y.transpose(0, 1), None


def _selective_rule_node(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> torch.Tensor:
    """hidden_states [B, S, VH, DV], dt [B, S, VH], A, D [VH], B, C [B, S, KH, DK] -> [B, S, VH, DV]; what is a rule
    of it as one graph node."""
    _only_known(others)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = torch.clamp(dt, *dt_limit)
    elif not dt_softplus:
        dt = torch.relu(dt)
    operands = [x.transpose(0, 1) for x in (C, B, hidden_states, A * dt, dt)]
    y = torch.onnx.ops.symbolic(
        f"{DOMAIN}::SelectiveRule",
        operands,
        {"scale": 1.0},
        dtype=hidden_states.dtype,
        shape=operands[2].shape,
        version=VERSION,
    )
    y = y.transpose(0, 1)
    return y if D is None else y + D[:, None] * hidden_states


def _selective_scan_node(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **others: Any,
) -> torch.Tensor:
    """hidden_states, dt, z [B, C, S], A [C, N], B, C [B, N, S], D, delta_bias [C] -> [B, C, S], as one graph node."""
    if others.get("return_last_state"):
        raise UnknownError("its selective scan gives its last state")
    vectors = {"bias": delta_bias, "skip": D, "gate": z, "softplus of its steps": delta_softplus or None}
    lacking = [name for name, value in vectors.items() if value is None]
    if lacking:
        raise UnknownError(f"its selective scan has no {lacking[0]}")
    assert delta_bias is not None
    assert D is not None
    assert z is not None
    rows = [x.permute(2, 0, 1) for x in (hidden_states, dt, z, B, C)]
    y: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{SELECTIVE_SCAN}",
        (*rows, A, delta_bias, D),
        {},
        dtype=hidden_states.dtype,
        shape=rows[0].shape,
        version=VERSION,
    )
    return y.permute(1, 2, 0)


def _only_known(others: dict[str, Any]) -> None:
    """Refuse what would change the results: a state to begin with, several sequences in a row."""
    unknown = next((name for name in UNKNOWN if others.get(name) is not None), None)
    if unknown:
        raise UnknownError(f"its layers with a state take {unknown}")


UNKNOWN = ("initial_state", "cu_seqlens", "seq_idx", "initial_states", "z")
NODES = {
    "causal_conv1d_fn": _conv_node,
    "torch_chunk_gated_delta_rule": _delta_rule_node,
    "chunk_kimi_delta_attention": _delta_rule_node,
    "mamba2_chunk_scan": _selective_rule_node,
    "mamba_selective_scan": _selective_scan_node,
}
"""Functions of a model's module, and what makes a node in their place."""

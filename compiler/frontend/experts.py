"""Mixtures of experts in the exported graph: each is one node of `llmc.Experts…`.

transformers calls the function registered here for the experts of every layer, whatever the architecture, as it does
for attention.  The router in front of it is exported as it is written.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from llmc.compiler.frontend.unsupported import unsupported
from llmc.compiler.ops import DOMAIN, VERSION, experts_name

ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "gelu_pytorch_tanh": "GeluTanh", "gelu_new": "GeluTanh"}
"""What transformers calls an activation, and what our operators do."""

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""

EXPECTED = {
    "has_gate": (True, "have no gate"),
    "has_bias": (False, "have biases"),
    "is_transposed": (False, "keep their weights transposed"),
    "is_concatenated": (True, "interleave gate and up"),
    "has_post_expert_norm": (False, "end with a norm"),
}
"""What a module says of its experts' arithmetic, what is compiled, and what to say of anything else."""


def check_experts(config: PretrainedConfig, model: PreTrainedModel, graph: ir.Graph) -> None:
    """Refuse a model whose experts did not all become nodes: their weights would be read, and something else done."""
    n_layers = sum(hasattr(module, "is_concatenated") for module in model.modules())
    n_nodes = sum(node.domain == DOMAIN and node.op_type.startswith("Experts") for node in graph)
    if n_nodes != n_layers:
        raise unsupported(config, f"{n_nodes} of its {n_layers} mixtures of experts go through transformers' interface")
    if not n_layers and any(isinstance(n := getattr(config, name, 0), int) and n > 1 for name in COUNTS):
        raise unsupported(config, "its experts do not go through transformers' experts interface")


def _experts_node(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, K], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, K], as one graph node."""
    for name, (expected, said) in EXPECTED.items():
        if getattr(module, name) != expected:
            raise unsupported(module.config, f"its experts {said}")
    activation = next((ours for name, ours in ACTIVATIONS.items() if _is_activation(module.act_fn, name)), None)
    if type(module)._apply_gate is not _default_apply_gate or activation is None:
        raise unsupported(module.config, "its experts have a gate of their own")
    result: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{experts_name(activation)}",
        (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj),
        {},
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=VERSION,
    )
    return result


def _is_activation(module: Any, name: str) -> bool:
    return type(module) is type(ACT2FN[name])


ALL_EXPERTS_FUNCTIONS.register("llmc", _experts_node)

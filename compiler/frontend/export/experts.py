"""Mixtures of experts in the exported graph: each is one node of `llmc.Experts…`.

transformers calls the function registered here for the experts of every layer, whatever the architecture, as it does
for attention.  The router in front of it is exported as it is written.  Experts whose weights lie another way than
[E, 2N, K], gate first, and [E, K, N] get nodes in front that bring them into this order; a pass,
passes/arrange_experts.py, lets that be done as weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from llmc.compiler.frontend.export.unsupported import unsupported
from llmc.compiler.graph import is_experts
from llmc.compiler.ops import DOMAIN, VERSION, clamped_experts_name, experts_name

ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "gelu_pytorch_tanh": "GeluTanh", "gelu_new": "GeluTanh"}
"""What transformers calls an activation, and what our operators do."""

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts."""

EXPECTED = {"has_gate": (True, "have no gate"), "has_post_expert_norm": (False, "end with a norm")}
"""What a module says of its experts' arithmetic, what is compiled, and what to say of anything else."""

LIMITS, ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
"""What modules call the numbers of a clamped gate."""
GATE = "llmc_gate"
"""The attribute of a module that says what its gate does: an activation's name, or a Clamp."""


@dataclass(frozen=True)
class Clamp:
    """The gate g · sigmoid(alpha g) · (u + offset), g = min(gate, limit), u = up within ±limit."""

    alpha: float
    limit: float
    offset: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.offset)


def check_experts(config: PretrainedConfig, model: PreTrainedModel, graph: ir.Graph) -> None:
    """Refuse a model whose experts did not all become nodes: their weights would be read, and something else done."""
    n_layers, n_nodes = len(_mixtures(model)), sum(map(is_experts, graph))
    if n_nodes != n_layers:
        raise unsupported(config, f"{n_nodes} of its {n_layers} mixtures of experts go through transformers' interface")


def require_interface(config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Refuse a mixture whose modules of experts do not go through the interface, before it is traced; but for those
    that multiply by the weights of all at once, which the graph shows (passes/form_experts.py)."""
    counts = [n for name in COUNTS if isinstance(n := getattr(config, name, 0), int) and n > 1]
    if counts and not _mixtures(model) and not any(_has_all_weights(module, counts) for module in model.modules()):
        raise unsupported(config, "its experts do not go through transformers' experts interface")


def name_gates(model: PreTrainedModel) -> None:
    """Tell each module of experts what its gate does, before it is traced."""
    for module in _mixtures(model):
        setattr(module, GATE, _activation(module) or _clamp(module))


def _mixtures(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules of experts that go through the interface."""
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def _has_all_weights(module: torch.nn.Module, counts: list[int]) -> bool:
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return len(weights) == 2 and all(weight.shape[0] in counts for weight in weights)


def _activation(module: Any) -> str | None:
    if type(module)._apply_gate is not _default_apply_gate:
        return None
    if module.act_fn is torch.nn.functional.silu:  # a function, whose type says nothing
        return ACTIVATIONS["silu"]
    return next((ours for name, ours in ACTIVATIONS.items() if type(module.act_fn) is type(ACT2FN[name])), None)


def _clamp(module: Any) -> Clamp | None:
    """The clamped gate that gives what the module's own does, for numbers on both sides of every bound."""
    limit, alpha = (next((n for name in names if (n := _number(module, name))), None) for names in (LIMITS, ALPHAS))
    if limit is None:
        return None
    line = torch.linspace(-2 * limit, 2 * limit, 41)
    gate, up = torch.cartesian_prod(line, line).T
    both = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], 1).flatten()
    with torch.no_grad():
        wanted = module._apply_gate(both[None])[0]
        clamps = (Clamp(a, limit, offset) for a, offset in product((alpha or 1.0, 1.0), (0.0, 1.0)))
        return next((clamp for clamp in clamps if torch.allclose(clamp(gate, up), wanted, rtol=1e-5, atol=1e-6)), None)


def _number(module: Any, name: str) -> float | None:
    value = getattr(module, name, None)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _experts_node(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, K], top_k_index int64 [T, k], top_k_weights [T, k] -> [T, K], as one graph node."""
    for name, (expected, said) in EXPECTED.items():
        if getattr(module, name) != expected:
            raise unsupported(module.config, f"its experts {said}")
    gate = getattr(module, GATE)
    if gate is None:
        raise unsupported(module.config, "its experts have a gate of their own")
    if module.has_bias and not isinstance(gate, Clamp):
        raise unsupported(module.config, "its experts have biases")
    name = clamped_experts_name(module.has_bias) if isinstance(gate, Clamp) else experts_name(gate)
    weights = [_gate_first(module, _by_rows(module, module.gate_up_proj)), _by_rows(module, module.down_proj)]
    if module.has_bias:
        weights += [_gate_first(module, module.gate_up_proj_bias), module.down_proj_bias]
    result: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        (hidden_states, top_k_index, top_k_weights, *weights),
        vars(gate) if isinstance(gate, Clamp) else {},
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=VERSION,
    )
    return result


def _by_rows(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """[E, N, K] of a weight that the module has so, or transposed."""
    return weight.transpose(1, 2) if module.is_transposed else weight


def _gate_first(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """[E, 2N, …], first the rows of gates, of a weight where they may alternate with those of up."""
    return weight if module.is_concatenated else torch.cat([weight[:, ::2], weight[:, 1::2]], 1)


ALL_EXPERTS_FUNCTIONS.register("llmc", _experts_node)

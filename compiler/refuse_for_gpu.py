"""What has kernels for CPUs alone, refused by name before anything is planned for a GPU."""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.graph import is_experts, op_name
from llmc.compiler.ops import CHANNEL_DELTA, DOMAIN, rule_name
from llmc.runtime.errors import LlmcError

LACKING = {
    f"{DOMAIN}.KeepGroups": "routers that choose among groups of experts in a way of their own have",
    f"{DOMAIN}.Stateful{rule_name(CHANNEL_DELTA)}": "delta rules whose state decays channel by channel have",
}
"""Operators of a step graph, and what to say of them."""
HINT = "compile it for CPUs: --target cpu"


def refuse_experts(model: ir.Model, dtype: str) -> None:
    """Raise LlmcError if GPUs have no kernels for the mixtures of experts of an exported graph, in this dtype."""
    if dtype == "f32" and any(map(is_experts, model.graph)):
        fact = "mixtures of experts in float32 have no kernels for GPUs"
        raise LlmcError(fact, place="--target cuda", hint=f"{HINT}, or --dtype bf16")


def refuse_for_gpu(model: ir.Model) -> None:
    """Raise LlmcError if GPUs have no kernels for an operator of the step graph."""
    found = [said for op, said in LACKING.items() if any(op_name(node) == op for node in model.graph)]
    if found:
        raise LlmcError(f"{found[0]} no kernels for GPUs yet", place="--target cuda", hint=HINT)

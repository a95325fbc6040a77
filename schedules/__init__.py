"""Kernels: which one executes a call, and how the constants lie for it."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.records import Tuned
from llmc.schedules.rule import Rule

FAMILIES = {
    "cpu": (
        "cpu.linear.amx_quant_rule",
        "cpu.linear.quant_rule",
        "cpu.linear.amx_rule",
        "cpu.linear.rule",
        "cpu.experts.rule",
        "cpu.linear.heads_rule",
        "cpu.attention.rule",
        "cpu.attention.latent_rule",
        "cpu.states.rule",
        "cpu.states.scan_rule",
        "cpu.norm",
        "cpu.query_key_norm",
        "cpu.low_rank",
        "cpu.given",
        "cpu.turned",
        "cpu.gather",
        "cpu.pool",
        "cpu.columns",
        "cpu.top_k",
        "cpu.elementwise",
        "fallback",
    ),
    "cuda": (
        "cuda.linear.rule",
        "cuda.experts.rule",
        "cuda.router",
        "cuda.attention.rule",
        "cuda.attention.any_rule",
        "cuda.attention.latent_rule",
        "cuda.states.rule",
        "cuda.states.scan_rule",
        "cuda.linear.heads_rule",
        "cuda.norm",
        "cuda.query_key_norm",
        "cuda.gated_norm",
        "cuda.low_rank",
        "cuda.gather",
        "cuda.pool",
        "cuda.columns",
        "cuda.elementwise",
        "cuda.sample",
        "cuda.fallback",
    ),
}
"""For each kind of target, modules with RULES in the order they are asked; the fallback never says no."""


@functools.cache
def rules(kind: str) -> tuple[Rule, ...]:
    """Every rule for a kind of target: the first that matches a call implements it."""
    modules = [importlib.import_module(f"llmc.schedules.{family}") for family in FAMILIES[kind]]
    return tuple(rule for module in modules for rule in module.RULES)


def implement(call: Call, target: Target, tuned: Tuned | None = None) -> Implementation:
    """How the call is executed on the target.  tuned: the parameters that `llmc tune` found; a call that has none there
    gets those of the rule's own choice.  Raises LlmcError when no rule knows the call.
    """
    rule, own = rule_of(call, target)
    params, record = (tuned or Tuned()).choose(rule, call, target, own)
    found = record.to_json() if record else {}
    return replace(rule.implement(call, params, target), rule=rule.name, params=str(params), measured=found)


def rule_of(call: Call, target: Target) -> tuple[Rule, Any]:
    """The rule that implements the call, and the parameters of its own choice.  Raises LlmcError when none knows it."""
    for rule in rules(target.kind):
        params = rule.match(call, target)
        if params is not None:
            return rule, params
    raise LlmcError(f"no kernel for {call.op}", place=str(call))

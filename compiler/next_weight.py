"""Which weight a product's kernel asks for beside its own: the one that the next product streams.

Kernels that take `Operand("next")` get it where a plan is complete, when it is known what follows:

    body     qkv -> o -> gate, up -> down -> qkv of the next layer … down of the last
    head     logits                             (behind the last of a body, and in front of the first)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmc.compiler.kernel import NEXT_TAIL
from llmc.compiler.plan import BODY, HEAD, PlannedCall, StepPlan
from llmc.runtime.format import SPACES, Argument

WEIGHTS = SPACES.index("weights")
NEXT = (Argument(WEIGHTS, -1, 0), Argument(WEIGHTS, -2, 0))
"""What stands for `Operand("next")`, 0 and 1, until it is known."""


def with_next_weights(plans: Sequence[StepPlan]) -> list[StepPlan]:
    """The plans with these arguments resolved."""
    first = {kind: next(filter(None, map(first_asker, of_kind(plans, kind))), None) for kind in (BODY, HEAD)}
    return [resolved(plan, first.get(HEAD if plan.kind == BODY else BODY)) for plan in plans]


def of_kind(plans: Sequence[StepPlan], kind: int) -> list[StepPlan]:
    return [plan for plan in plans if plan.kind == kind]


def first_asker(plan: StepPlan) -> PlannedCall | None:
    return next(filter(asks, plan.calls), None)


def asks(call: PlannedCall) -> bool:
    return any(argument in NEXT for argument in call.arguments)


def resolved(plan: StepPlan, behind: PlannedCall | None) -> StepPlan:
    """behind: the product that follows the plan's last; where there is none, that has its own first follow it."""
    calls = list(plan.calls)
    askers = [index for index, call in enumerate(calls) if asks(call)]
    followers = [calls[index] for index in askers[1:]] + [behind or calls[askers[0]] for _ in askers[:1]]
    for index, follower in zip(askers, followers, strict=True):
        calls[index] = replace(calls[index], arguments=tuple(told(a, follower) for a in calls[index].arguments))
    return replace(plan, calls=tuple(calls))


def told(argument: Argument, follower: PlannedCall) -> Argument:
    if argument not in NEXT:
        return argument
    weight = max((a for a in follower.arguments if a.space == WEIGHTS), key=lambda a: a.n_bytes)
    if argument == NEXT[0]:
        return weight
    tail = max(0, weight.n_bytes - 1) // NEXT_TAIL * NEXT_TAIL
    return Argument(WEIGHTS, weight.offset + tail, weight.n_bytes - tail)

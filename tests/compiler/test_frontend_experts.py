"""compiler/frontend/export/experts.py: gates are known by what they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from llmc.compiler.frontend.export.experts import GATE, Clamp, name_gates


def gate_of(apply_gate: Any, *, is_concatenated: bool = True, **settings: Any) -> Any:
    """What a module of experts with this gate is told that it does."""

    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            vars(self).update(settings)

    kind: Any = Experts
    if apply_gate is not None:
        kind._apply_gate = apply_gate
    made: Any = use_experts_implementation(kind, is_concatenated=is_concatenated)(SimpleNamespace())
    name_gates(made)
    return getattr(made, GATE)


def clamped(self: Any, both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    inner: torch.Tensor = gate * torch.sigmoid(gate * self.alpha) * (up + self.offset)
    return inner


@pytest.mark.parametrize("is_concatenated", [False, True])
@pytest.mark.parametrize(("alpha", "offset"), [(1.702, 1.0), (1.0, 0.0)])
def test_clamped_gates_are_known_by_what_they_do(is_concatenated: bool, alpha: float, offset: float) -> None:
    found = gate_of(clamped, is_concatenated=is_concatenated, alpha=alpha, limit=7.0, offset=offset)
    assert found == Clamp(alpha, 7.0, offset)


def test_a_gate_of_one_activation_has_its_name() -> None:
    assert gate_of(None, act_fn=ACT2FN["silu"]) == "Silu"
    assert gate_of(None, act_fn=torch.nn.functional.silu) == "Silu"
    assert gate_of(None, act_fn=torch.nn.functional.hardswish) is None
    assert gate_of(None, act_fn=torch.nn.Hardswish()) is None


def test_any_other_gate_is_not_known() -> None:
    assert gate_of(lambda self, both: clamped(self, both).clamp(max=9), alpha=1.0, limit=7.0, offset=0.0) is None
    assert gate_of(lambda self, both: both.chunk(2, dim=-1)[0]) is None

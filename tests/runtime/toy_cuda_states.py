"""The toy model with a state in its second layer, for a GPU: the oracle is the same."""

from __future__ import annotations

from pathlib import Path

from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda
from tests.runtime.toy_states import StatePlan


class StatesCudaPlan(StatePlan, toy_cuda.ToyCudaPlan):
    """Its plans, of the format that has states."""


def build_artifact(path: Path, code: bytes, **changes: int) -> Path:
    """With the code of any toy for a GPU; `changes` replace fields of the plan's header."""
    path.write_bytes(toy.pack_sections(toy_cuda.sections(code, plan=StatesCudaPlan().pack(**changes))))
    return path

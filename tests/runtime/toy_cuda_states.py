"""The toy model with a state in its second layer, for a GPU: the oracle is the same."""

from __future__ import annotations

from pathlib import Path

from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda

SLOT_BYTES = 4 * toy.CHANNELS
SLOTS = 5


class StatesCudaPlan(toy_cuda.ToyCudaPlan):
    """The toy's plans for a GPU, of the format that has states."""

    def __init__(self) -> None:
        super().__init__()
        self.header = self.header._replace(slot_bytes=SLOT_BYTES, default_slots=SLOTS)

    def body_calls(self, m: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        calls = super().body_calls(m)
        last = len(calls) - 2
        name, _, (x, positions, *_, y) = calls[last]
        assert name == f"attend_{m}"
        calls[last - 1 : last + 1] = [
            (f"recur_{m}", 1, [x, positions, ("slots", 0, 4 * m), ("states", 0, SLOT_BYTES), y])
        ]
        return calls


def build_artifact(path: Path, code: bytes, **changes: int) -> Path:
    """With the code of any toy for a GPU; `changes` replace fields of the plan's header."""
    path.write_bytes(toy.pack_sections(toy_cuda.sections(code, plan=StatesCudaPlan().pack(**changes))))
    return path

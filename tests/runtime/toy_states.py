"""The toy model with a state in its second layer: the oracle is the same."""

from __future__ import annotations

from pathlib import Path

from tests.runtime import toy_artifact as toy

SLOT_BYTES = 4 * toy.CHANNELS
SLOTS = 5


class StatePlan(toy.ToyPlan):
    """The toy's plan, of the format that has states."""

    def __init__(self) -> None:
        super().__init__()
        self.header = self.header._replace(slot_bytes=SLOT_BYTES, default_slots=SLOTS)

    def body_calls(self, m: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        calls = super().body_calls(m)
        last = [name for name, _, _ in calls].index(f"attend_{m}", -3)
        x, positions, *_, y = calls[last][2]
        states, slots = ("states", 0, SLOT_BYTES), ("slots", 0, 4 * m)
        calls[last - 1 : last + 1] = [(f"recur_{m}", 1, [x, positions, slots, states, y])]
        return calls


def sections(code: bytes = b"") -> dict[str, bytes]:
    return toy.toy_sections(code, plan=StatePlan().pack())


def build_artifact(folder: Path) -> Path:
    """A whole artifact, which can be loaded."""
    sources = toy.toy_sources(folder, plan=StatePlan())
    code = toy.link_c(folder / "code.so", sources, "-O2", "-shared").read_bytes()
    path = folder / "states.so"
    path.write_bytes(toy.pack_sections(sections(code)))
    return path

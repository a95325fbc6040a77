"""What a call of a mixture of experts says of its gate, for the schedules of every target."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.kernel import Call
from llmc.compiler.ops import CLAMP, CLAMPED_EXPERTS, DOMAIN, RESIDUAL_CLAMPED_EXPERTS


@dataclass(frozen=True)
class Clamp:
    """A gate g · sigmoid(alpha g) · (u + offset), g = min(gate, limit), u = up within ±limit."""

    alpha: float
    limit: float
    offset: float


def clamp_of(call: Call) -> Clamp | None:
    """The clamped gate of experts that have one; None for all other calls."""
    if call.op.removeprefix(f"{DOMAIN}.") not in CLAMPED_EXPERTS | RESIDUAL_CLAMPED_EXPERTS:
        return None
    return Clamp(*(float(call.attribute(name)) for name in CLAMP))

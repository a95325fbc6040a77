"""What the page shows, read from the artifact and, if there is one, from a profile."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from llmc.cli.call_facts import CallFacts, facts_of_plan
from llmc.cli.machine_limits import Limits, known_limits, tuned_machines
from llmc.runtime import ArtifactFile
from llmc.runtime.format import PLAN_KINDS
from llmc.runtime.plan import PlanTables

Said = dict[str, Any]


class Plan(NamedTuple):
    """A plan with what is known of each of its calls; measured: its part of a profile, or None."""

    kind: str
    rows: int
    calls: list[CallFacts]
    measured: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.rows} row{'s' * (self.rows != 1)}"

    @property
    def context(self) -> float | None:
        """Tokens that attention reads: measured, or as the schedules count (None)."""
        return float(self.measured["context"]) if self.measured else None

    def work(self, call: CallFacts) -> tuple[float, float]:
        """Bytes and operations of a call, 0 where they are not known."""
        return call.work(self.context) or (0.0, 0.0)

    @property
    def total(self) -> tuple[float, float]:
        works = [self.work(call) for call in self.calls]
        return sum(w[0] for w in works), sum(w[1] for w in works)


class Facts:
    """An open artifact, its JSON and its plans; `profile` is what profile_trace.summary made of a run.

    program: the number of that for one of its targets.
    """

    def __init__(self, file: ArtifactFile, profile: Mapping[str, Any] | None, program: int = 0) -> None:
        self.file, self.profile = file, profile
        self.manifest: Said = file.manifest(program)
        self.graph: Said = file.graph(program) or {}
        self.tables: PlanTables = file.plan(program)
        measured = {(p["kind"], p["rows"]): p for p in (profile or {}).get("plans", ())}
        self.plans = [
            Plan(kind, plan.n_rows, facts_of_plan(self.tables, plan, self.manifest), measured.get((kind, plan.n_rows)))
            for plan in self.tables.plans
            for kind in (PLAN_KINDS[plan.kind],)
        ]

    @property
    def model(self) -> Said:
        return dict(self.manifest.get("model", {}))

    @cached_property
    def limits(self) -> Limits | None:
        """The limits of the machine that was profiled, else of one that the artifact, or its target, was tuned on."""
        if self.profile:
            return Limits(**self.profile["limits"]) if self.profile.get("limits") else None
        return next(filter(None, (known_limits(self.manifest, name) for name in tuned_machines(self.manifest))), None)

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The text of each token; empty when the artifact has none."""
        if "vocabulary" not in self.file.sections:
            return []
        data = self.file.section("vocabulary")
        n = struct.unpack_from("<I", data)[0] if len(data) >= 8 else 0
        if 4 * (n + 2) > len(data):
            return []
        offsets, start = struct.unpack_from(f"<{n + 1}I", data, 4), 4 * (n + 2)
        return [data[start + a : start + b] for a, b in pairwise(offsets)]

    def attribute(self, name: str) -> int | None:
        """An attribute of the step graph's first attention, from its text."""
        found = re.search(rf"PagedAttention\(.*?\b{name}=(\d+)", str(self.graph.get("final", "")))
        return int(found[1]) if found else None


def category(op: str) -> str:
    """The colour of an operator: what kind of work it is."""
    if "Attention" in op or op == "RotaryEmbedding":
        return "attention"
    if "Linear" in op or "Experts" in op or op in ("HeadProduct", "MatMul", "Gemm"):
        return "linear"
    if "Norm" in op:
        return "norm"
    if op in ("Reshape", "Transpose", "Concat", "Split", "Slice", "Unsqueeze", "Squeeze", "Expand", "Cast", "Shape"):
        return "movement"
    return "lookup" if op in ("Gather", "WeightRows") else "elementwise"


CATEGORIES = {
    "linear": "matrix product",
    "attention": "attention",
    "norm": "normalisation",
    "elementwise": "element by element",
    "lookup": "table lookup",
    "movement": "reshape, transpose",
}

"""What each kernel call of a plan is for: its operator, its weight, what it moves and computes.

Plans hold kernels and addresses; the manifest says which schedule each kernel belongs to, and which weight lies where.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from llmc.runtime.format import PLAN_KINDS, SPACES, CallRecord, PlanRecord
from llmc.runtime.plan import PlanTables

WEIGHTS, KV = SPACES.index("weights"), SPACES.index("kv")
NO_SCHEDULE: Mapping[str, Any] = {}


class CallFacts(NamedTuple):
    """What is known of one kernel call of a plan.

    number: its place in the plan section.
    node: the number of its operator in the plan, shared by all calls of that; -1 when the manifest does not say.
    op: the operator's name, such as "Linear".  schedule: its record in the manifest.
    weight: "model.layers.0.mlp.down_proj.weight"; for attention "layers.0.kv_cache"; "" where it reads none.
    n_bytes, n_operations: by the schedule's own count; None when the manifest does not say.
    context_of_bytes: for attention, how many keys a row reads in that count; 0: bytes do not depend on the context.
    """

    number: int
    kernel: str
    node: int
    op: str
    schedule: Mapping[str, Any]
    weight: str
    n_bytes: int | None
    n_operations: int | None
    context_of_bytes: int

    @property
    def layer(self) -> int | None:
        found = re.search(r"\.(\d+)\.", self.weight)
        return int(found[1]) if found else None

    @property
    def short_kernel(self) -> str:
        return shortened(self.kernel)

    def work(self, context: float | None = None) -> tuple[float, float] | None:
        """Bytes and operations, scaled to a mean context where they depend on it; None when they are not known."""
        if self.n_bytes is None or self.n_operations is None:
            return None
        share = context / self.context_of_bytes if context is not None and self.context_of_bytes else 1.0
        return self.n_bytes * share, self.n_operations * share


def shortened(kernel: str) -> str:
    """A kernel's name without its end: the hash, and the CPU level, which tell kernels of one shape apart."""
    return re.sub(r"_[0-9a-f]{8}(_v\d\w*)?$", "", kernel)


def facts_of_plan(tables: PlanTables, plan: PlanRecord, manifest: Mapping[str, Any]) -> list[CallFacts]:
    """The calls of one plan, in the order they run."""
    names = weight_names(manifest)
    kind = PLAN_KINDS[plan.kind]
    records = [r for r in manifest.get("schedules", ()) if (r.get("plan"), r.get("m")) == (kind, plan.n_rows)]
    calls = tables.calls_of(plan)
    kernels = [tables.kernels[call.kernel].name for call in calls]
    facts = []
    for index, (node, record, place) in enumerate(match(kernels, records)):
        arguments = tables.arguments_of(calls[index])
        op = str(record.get("op", "")).removeprefix("llmc.")
        weights = [names.get(a.offset, "") for a in arguments if a.space == WEIGHTS]
        cached = cache_name(tables, calls[index], manifest)
        weights = [cached, *weights] if op.endswith("Attention") else [*weights, cached]  # before its norms' weights
        facts.append(
            CallFacts(
                number=plan.first_call + index,
                kernel=kernels[index],
                node=node,
                op=op,
                schedule=record,
                weight=next(filter(None, weights), ""),
                n_bytes=count(record, "bytes", place),
                n_operations=count(record, "operations", place),
                context_of_bytes=context_counted(tables, calls[index], kernels[index]),
            )
        )
    return with_weights(facts)


def match(kernels: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any], int]]:
    """For each kernel the node it belongs to, that node's schedule, and the kernel's place in it.

    A schedule names the kernels that it launches, one after the other.
    """
    at = node = 0
    while at < len(kernels):
        fitting = [r for r in records if r.get("kernels") and kernels[at : at + len(r["kernels"])] == r["kernels"]]
        if not fitting:
            yield -1, NO_SCHEDULE, 0
            at += 1
            continue
        record = max(fitting, key=lambda r: len(r["kernels"]))
        for place in range(len(record["kernels"])):
            yield node, record, place
        at += len(record["kernels"])
        node += 1


def count(record: Mapping[str, Any], what: str, place: int) -> int | None:
    """The bytes or operations of the launch at `place` in a schedule; None when the record does not say."""
    each = record.get(f"kernel_{what}", ())
    if place < len(each):
        return int(each[place])
    return int(record[what]) if what in record and len(record["kernels"]) == 1 else None


def context_counted(tables: PlanTables, call: CallRecord, kernel: str) -> int:
    """How many keys a schedule counts for a call of attention: half a full context; 0 for other calls."""
    attends = kernel.startswith("attend") and any(a.space == KV for a in tables.arguments_of(call))
    return tables.header.pages_per_sequence * tables.header.page_tokens // 2 if attends else 0


def cache_name(tables: PlanTables, call: CallRecord, manifest: Mapping[str, Any]) -> str:
    """Such as "layers.3.kv_cache", for a call that reads or writes that; "" for others."""
    offsets = [a.offset for a in tables.arguments_of(call) if a.space == KV]
    if not offsets:
        return ""
    starts = list(accumulate(layer_sizes(tables.header.kv_page_bytes, manifest), initial=0))
    return f"layers.{bisect_right(starts, offsets[0]) - 1}.kv_cache"


def layer_sizes(page_bytes: int, manifest: Mapping[str, Any]) -> list[int]:
    """Bytes in a page of each layer that keeps a cache; older artifacts do not say, and all layers are alike there."""
    sizes = manifest.get("kv_cache", {}).get("layer_bytes")
    n_layers = max(1, int(manifest.get("model", {}).get("n_layers") or 1))
    return list(sizes) if sizes else [page_bytes // n_layers] * n_layers


def with_weights(facts: Sequence[CallFacts]) -> list[CallFacts]:
    """The calls, each with its node's weight: a call that prepares x for a product then says for which."""
    weights = {fact.node: fact.weight for fact in facts if fact.weight and fact.node >= 0}
    return [fact._replace(weight=fact.weight or weights.get(fact.node, "")) for fact in facts]


def weight_names(manifest: Mapping[str, Any]) -> dict[int, str]:
    """The names of weights by their offset in the weights section, as `contracted` writes them."""
    return {w["offset"]: contracted(str(w["name"])) for w in manifest.get("weights", ())}


def contracted(name: str) -> str:
    """The name of weights that are one, shorter: {a.q_proj.w,a.k_proj.w} becomes a.{q,k}_proj.w."""
    if not (name.startswith("{") and name.endswith("}")):
        return name
    parts = name[1:-1].split(",")
    first, last = min(parts), max(parts)
    start = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    room = min(map(len, parts)) - start
    end = next((i for i in range(room) if len({part[-1 - i] for part in parts}) > 1), room)
    tail = parts[0][len(parts[0]) - end :]
    middles = ",".join(part[start : len(part) - end] for part in parts)
    return f"{parts[0][:start]}{{{middles}}}{tail}"

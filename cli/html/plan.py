"""The plans: what a step moves and computes, as a timeline of kernels, and against the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmc.cli.call_facts import CallFacts, shortened
from llmc.cli.html import roofline
from llmc.cli.html.artifact_facts import CATEGORIES, Facts, Plan, category
from llmc.cli.html.layer import legend
from llmc.cli.html.layer_drawing import weight_label
from llmc.cli.html.markup import Child, Markup, box, code, drawing, element, paragraph, section, table, text
from llmc.cli.html.ticks import axis, in_time
from llmc.cli.output import in_bytes
from llmc.cli.profile_table import in_percent

WIDTH = 1040.0


def show(facts: Facts) -> Child:
    measured = any(plan.measured for plan in facts.plans)
    profile = facts.profile or {}
    said: list[Child] = [
        "A step is a body, which takes its tokens through all layers, and a head, which turns rows into logits. "
        "Each has a fixed number of rows, so every kernel, address and size is known before it runs. "
    ]
    if measured:
        day = element("span", str(profile["date"])[:10], class_="whole")
        said += [f"Times are medians of a run on {profile['machine']}, ", day, "."]
    elif facts.limits:
        said.append(f"No profile was given: times are the least that {facts.limits.machine} allows ({facts.limits}). ")
    else:
        said.append("No profile was given, and the limits of the machine are not known: widths are bytes. ")
    used = sorted({category(call.op) for p in facts.plans for call in p.calls if call.op}, key=list(CATEGORIES).index)
    shown = [plan for plan in facts.plans if plan.measured] if measured else facts.plans
    opened = {id(shown[0])} | {id(p) for p in shown if p.kind == "head"} if measured else {id(facts.plans[0])}
    return section(
        "plan",
        "The plan of a step",
        paragraph(said),
        overview(facts),
        cautions(facts),
        roofline.show(facts),
        element("h3", "Timelines"),
        legend(used),
        [details(facts, plan, is_open=id(plan) in opened) for plan in shown],
        paragraph(element("span", "Bodies and heads that did not run while profiling are left out.", class_="quiet"))
        if measured and len(shown) < len(facts.plans)
        else None,
    )


def overview(facts: Facts) -> Markup:
    """A row for each plan."""
    rows = []
    for plan in facts.plans:
        n_bytes, n_operations = plan.total
        least = sum(facts.limits.least_ns(*plan.work(call)) for call in plan.calls) if facts.limits else None
        row: list[Child] = [plan.name, len(plan.calls), in_bytes(n_bytes), in_operations(n_operations)]
        row.append(f"{n_operations / n_bytes:.2g}" if n_bytes else "–")
        row.append(in_time(least) if least is not None else "–")
        if facts.profile:
            row.append(f"{plan.measured['runs']}" if plan.measured else "–")
            row.append(in_time(plan.measured["ns"]) if plan.measured else "–")
            row.append(in_percent(least / plan.measured["ns"]) if plan.measured and least else "–")
        rows.append(row)
    titles = ["plan", "calls", "moves", "computes", "FLOP / byte", "at least"]
    titles += ["runs", "measured", "of the limit"] if facts.profile else []
    return table(titles, rows, numeric=range(1, len(titles)))


def cautions(facts: Facts) -> Child:
    """What to know about the shares, where there are any."""
    if not facts.limits or not facts.profile:
        return None
    said = "The limit is memory's or the arithmetic's, whichever is slower; more than 100 % comes from a cache."
    if any(plan.measured and plan.measured["runs"] == 1 for plan in facts.plans):
        said += " A plan that ran once ran cold: it brought its weights and its memory in."
    return element("p", said, class_="quiet")


# -- one plan -----------------------------------------------------------------------


def details(facts: Facts, plan: Plan, *, is_open: bool) -> Markup:
    costs = [cost(facts, plan, index) for index in range(len(plan.calls))]
    n_bytes, n_operations = plan.total
    facts_line = f"{len(plan.calls)} calls · {in_bytes(n_bytes)} · {in_operations(n_operations)}"
    if plan.measured:
        facts_line += f" · {in_time(plan.measured['ns'])} measured"
    head = element("summary", element("strong", plan.name), " ", element("span", facts_line, class_="quiet"))
    layer = layer_in_the_middle(plan)
    return element(
        "details",
        head,
        strip(facts, plan, costs, range(len(plan.calls)), f"{plan.name}: all calls", 34.0),
        caption(facts, plan),
        (
            element("h4", f"Layer {plan.calls[layer[len(layer) // 2]].layer}, larger"),
            strip(facts, plan, costs, layer, f"{plan.name}: one layer", 46.0, named=True),
        )
        if layer
        else None,
        kernel_table(facts, plan, costs),
        open="open" if is_open else None,
        class_="plan",
    )


def cost(facts: Facts, plan: Plan, index: int) -> float:
    """How wide a call is drawn: its measured time in ns, the least time it can take, or its bytes."""
    if plan.measured and index < len(plan.measured["calls"]):
        return float(plan.measured["calls"][index])
    n_bytes, n_operations = plan.work(plan.calls[index])
    return facts.limits.least_ns(n_bytes, n_operations) if facts.limits else n_bytes


def in_cost(facts: Facts, plan: Plan, value: float) -> str:
    return in_time(value) if plan.measured or facts.limits else in_bytes(value)


def layer_in_the_middle(plan: Plan) -> range:
    """The calls of one layer: from where its weights are first used to where the next one's are."""
    starts: dict[int, int] = {}
    for index, call in enumerate(plan.calls):
        if call.layer is not None:
            starts.setdefault(call.layer, index)
    if len(starts) < 2:
        return range(0)
    order = sorted(starts)
    middle = order[(len(order) - 1) // 2]
    ends = [index for layer, index in starts.items() if index > starts[middle]]
    return range(starts[middle], min(ends, default=len(plan.calls)))


def strip(
    facts: Facts, plan: Plan, costs: Sequence[float], calls: range, label: str, height: float, named: bool = False
) -> Markup:
    """Calls in the order they run, as wide as they take long."""
    total = sum(costs[i] for i in calls) or 1.0
    x, parts = 0.0, []
    for index in calls:
        width = WIDTH * costs[index] / total
        call = plan.calls[index]
        parts.append(box(x, 0, max(width, 0.2), height, f"call {category(call.op)}", describe(facts, plan, index)))
        name = call_name(call)
        if named and width > 7.2 * len(name):
            parts.append(text(x + width / 2, height / 2 + 4, name, "on", "middle"))
        x += width
    marks = axis(total, WIDTH, height, lambda value: in_cost(facts, plan, value))
    return element("div", drawing(WIDTH, height + 22, parts, marks, label=label, class_="strip"), class_="scroll wide")


def call_name(call: CallFacts) -> str:
    """qkv for a product with {q,k,v}_proj, attend for attention."""
    kernel = call.short_kernel.split("_")[0]
    is_product = category(call.op) == "linear" and call.weight and kernel not in ("pack", "quantise")
    return weight_label(call.weight) if is_product else kernel


def describe(facts: Facts, plan: Plan, index: int) -> str:
    call = plan.calls[index]
    n_bytes, n_operations = plan.work(call)
    lines = [f"call {index}: {call.short_kernel}", f"{call.op} {call.weight}".strip()]
    lines.append(f"{in_bytes(n_bytes)}, {in_operations(n_operations)}")
    if plan.measured:
        ns = plan.measured["calls"][index]
        lines.append(f"{in_time(ns)}, {n_bytes / ns:.1f} GB/s, {n_operations / ns:.1f} GFLOP/s" if ns else in_time(ns))
    if facts.limits:
        lines.append(f"at least {in_time(facts.limits.least_ns(n_bytes, n_operations))}")
    return "\n".join(lines)


def caption(facts: Facts, plan: Plan) -> Markup:
    what = "its measured time" if plan.measured else "the least time it can take" if facts.limits else "what it moves"
    tokens = plan.context or max((call.context_of_bytes for call in plan.calls), default=0)
    context = f"; attention reads {tokens:.0f} tokens" if any(call.context_of_bytes for call in plan.calls) else ""
    return element("p", f"Each kernel is as wide as {what}{context}. Point at one for its numbers.", class_="quiet")


def kernel_table(facts: Facts, plan: Plan, costs: Sequence[float]) -> Markup:
    """Calls summed up by kernel, the costliest first."""
    sums: dict[str, dict[str, Any]] = {}
    for index, call in enumerate(plan.calls):
        n_bytes, n_operations = plan.work(call)
        entry = sums.setdefault(call.kernel, {"op": call.op, "calls": 0, "bytes": 0.0, "operations": 0.0, "cost": 0.0})
        for key, value in (("calls", 1), ("bytes", n_bytes), ("operations", n_operations), ("cost", costs[index])):
            entry[key] += value
    total = sum(costs) or 1.0
    rows = [
        kernel_row(facts, plan, name, entry, total) for name, entry in sorted(sums.items(), key=lambda s: -s[1]["cost"])
    ]
    titles = ["kernel", "share of the step"]
    if plan.measured or facts.limits:
        titles.append("time" if plan.measured else "at least")
    if plan.measured:
        titles += ["of the limit"] * bool(facts.limits) + ["GB/s", "GFLOP/s"]
    titles += ["calls", "moves", "computes"]
    return table(titles, rows, numeric=range(2, len(titles)), class_="kernels")


def kernel_row(facts: Facts, plan: Plan, name: str, entry: Mapping[str, Any], total: float) -> list[Child]:
    n_bytes, n_operations, cost = entry["bytes"], entry["operations"], entry["cost"]
    kind, share = category(entry["op"]), entry["cost"] / total
    row: list[Child] = [
        element("span", element("i", class_=f"chip {kind}"), code(shortened(name)), title=entry["op"], class_="key"),
        element(
            "div",
            element("i", class_=kind, style=f"width:{65 * share:.1f}%"),
            element("span", in_percent(share)),
            class_="bar said",
        ),
    ]
    if plan.measured or facts.limits:
        row.append(in_time(cost))
    if plan.measured:
        if facts.limits:
            row.append(in_percent(facts.limits.least_ns(n_bytes, n_operations) / cost) if cost else "–")
        row += [f"{n / cost:.1f}" if n and cost else "–" for n in (n_bytes, n_operations)]
    return [*row, entry["calls"], in_bytes(n_bytes), in_operations(n_operations)]


def in_operations(n: float) -> str:
    """262 kFLOP, 1.2 GFLOP."""
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g} {unit}FLOP" if n else "–"
        n /= 1000
    return f"{n:.3g} TFLOP"

"""The roofline: how fast the machine lets work of each intensity be, and where the plans lie."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from llmc.cli.html.artifact_facts import Facts, Plan
from llmc.cli.html.markup import Child, Markup, drawing, element, figure, text
from llmc.cli.machine_limits import Limits

WIDTH, HEIGHT = 640.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 16.0, 16.0, 44.0


class Scale:
    """Logarithms of data as pixels; axes reach from one power of ten to another."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = floor(log10(min(values))), ceil(log10(max(values)))
        self.high = max(self.high, self.low + 1)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (log10(value) - self.low) / (self.high - self.low) * (self._end - self._start)

    @property
    def powers(self) -> range:
        return range(self.low, self.high + 1)


def show(facts: Facts) -> Child:
    """Bodies, and joined steps that were measured, as points; hollow at the limit where they were not.  Nothing without
    a limit for arithmetic."""
    limits = facts.limits
    is_shown = [plan.kind == "body" or (plan.kind == "joined" and plan.measured) for plan in facts.plans]
    bodies = [plan for plan, shown in zip(facts.plans, is_shown, strict=True) if shown and all(plan.total)]
    if limits is None or not limits.operations_per_ns or not bodies:
        return None
    peak = limits.operations_per_ns
    intensities = [plan.total[1] / plan.total[0] for plan in bodies]
    rates = [rate(limits, plan) for plan in bodies]
    x = Scale([0.7 * min(intensities), *intensities, 3 * ridge(limits), ridge(limits) / 3], LEFT, WIDTH - RIGHT)
    y = Scale([*rates, 1.5 * peak], HEIGHT - BOTTOM, TOP)
    name = f"{peak:.0f} GFLOP/s, {limits.operations_name}"
    taken: list[tuple[float, float]] = []
    points = [point(x(a), y(b), plan, taken) for plan, a, b in zip(bodies, intensities, rates, strict=True)]
    picture = drawing(
        WIDTH,
        HEIGHT,
        axes(x, y),
        roof(limits, x, y),
        text(WIDTH - RIGHT - 6, y(peak) - 12, name, "tick", "end"),
        points,
        label="bodies under the roofline",
        class_="roofline",
    )
    said = "Filled: measured; hollow: not measured, drawn at the limit." if facts.profile else "All drawn at the limit."
    return figure(
        element("div", picture, class_="scroll wide small"),
        f"Bodies under the roofline of {limits.machine}. The slope is its read bandwidth "
        f"({limits.bytes_per_ns:.1f} GB/s), the flat part its arithmetic. {said}",
        "centred",
    )


def ridge(limits: Limits) -> float:
    """The intensity at which memory and arithmetic take equally long, in operations a byte."""
    return limits.operations_per_ns / limits.bytes_per_ns


def rate(limits: Limits, plan: Plan) -> float:
    """GFLOP/s: measured, or the most the limits allow."""
    n_bytes, n_operations = plan.total
    return n_operations / (plan.measured["ns"] if plan.measured else limits.least_ns(n_bytes, n_operations))


def roof(limits: Limits, x: Scale, y: Scale) -> Markup:
    """The line from where the slope enters the picture, over the ridge, to the right."""
    start = max(10.0**x.low, 10.0**y.low / limits.bytes_per_ns)
    corners = [(start, start * limits.bytes_per_ns)]
    corners += [(a, limits.operations_per_ns) for a in (ridge(limits), 10.0**x.high)]
    return element("polyline", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners), class_="roof")


def axes(x: Scale, y: Scale) -> list[Markup]:
    parts = []
    for power in x.powers:
        at = x(10.0**power)
        parts.append(element("path", d=f"M {at:.1f} {TOP} V {HEIGHT - BOTTOM}", class_="grid"))
        parts.append(text(at, HEIGHT - BOTTOM + 16, power_text(power), "tick", "middle"))
    for power in y.powers:
        at = y(10.0**power)
        parts.append(element("path", d=f"M {LEFT} {at:.1f} H {WIDTH - RIGHT}", class_="grid"))
        parts.append(text(LEFT - 8, at + 4, power_text(power), "tick", "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(text(middle, HEIGHT - 8, "operations a byte (FLOP / byte)", "axis-title", "middle"))
    parts.append(text(LEFT + 6, TOP + 14, "GFLOP/s", "axis-title"))
    return parts


def power_text(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"


def point(x: float, y: float, plan: Plan, taken: list[tuple[float, float]]) -> Markup:
    """A dot with its M below, where no other label is."""
    n_bytes, n_operations = plan.total
    class_ = "measured" if plan.measured else "predicted"
    about = element("title", f"{plan.name}: {n_operations / n_bytes:.2g} FLOP / byte")
    dot = element("circle", about, cx=x, cy=y, r=5.0, class_=class_)
    below = next(dy for dy in range(15, 400, 14) if all(abs(x - a) > 44 or abs(y + dy - b) > 12 for a, b in taken))
    taken.append((x, y + below))
    return element("g", dot, text(x + 8, y + below, f"M={plan.rows}", "name"))

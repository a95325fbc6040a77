"""A record as a picture: speed-up as bars, tokens a second as diamonds, a panel a model.  PNG or SVG, by the name.

The same records give the same bytes: no date, fixed ids, matplotlib's own font.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from llmc.bench.chart.baselines import SYSTEMS
from llmc.bench.chart.page import base_of, shown
from llmc.bench.chart.record import Panel, Rate, Record
from llmc.bench.chart.request import Task, in_k
from llmc.runtime.errors import LlmcError

BLUE, RED, INK, FAINT = "#2f6fb3", "#c8372d", "#262626", "#8a8a8a"
GRAYS = ("#b9b9b9", "#8f9aa5", "#d3c7a8", "#a8bfae", "#c3aebf")
WIDTH_IN, PANEL_IN, HEAD_IN, FOOT_IN = 8.8, 2.95, 0.42, 0.3
GROUP_GAP = 0.7
"""Between batch sizes, in widths of a length's slot."""
HEADROOM = 1.22
FEW_POINTS = 0.25
"""A system with fewer than this part of a panel's points is left to the table."""
LABEL_SHARE = 0.055
"""The height of a label, as a part of a panel's."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#bdbdbd",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "llmc",
    "svg.fonttype": "path",
}


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the picture of these records' panels.  Raises LlmcError."""
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise LlmcError(f"a picture is a .png or a .svg, not {path.suffix or 'without suffix'}", place=str(path))
    panels = [(record, panel) for record in records for panel in record.panels if panel.samples]
    if not panels:
        raise LlmcError("there is nothing to draw: no point was measured", place=str(path))
    with rc_context():
        rcdefaults()
        rcParams.update(STYLE)
        figure = chart(panels)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(part, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise LlmcError(f"the picture could not be written: {error.strerror}", place=str(path)) from error


def chart(panels: Sequence[tuple[Record, Panel]]) -> Figure:
    """One panel below the other, the legend above, the machine below."""
    height = HEAD_IN + FOOT_IN + PANEL_IN * len(panels)
    figure = Figure(figsize=(WIDTH_IN, height))
    for index, (record, panel) in enumerate(panels):
        top = height - HEAD_IN - PANEL_IN * index
        box = (0.07, (top - PANEL_IN + 0.55) / height, 0.86, (PANEL_IN - 0.95) / height)
        draw_panel(figure.add_axes(box), record, panel)
    legend(figure, panels, height)
    figure.text(0.07, 0.1 / height, foot(panels), fontsize=7, color=FAINT)
    return figure


def draw_panel(axes: Axes, record: Record, panel: Panel) -> None:
    systems, base = in_order(panel), base_of(panel)
    right = axes.twinx()
    slots = {
        Task(batch, length): group * (len(panel.lengths) + GROUP_GAP) + index
        for group, batch in enumerate(panel.batches)
        for index, length in enumerate(panel.lengths)
    }
    width = 0.8 / len(systems)
    highest = 1.0
    for task, left in slots.items():
        for index, system in enumerate(systems):
            x = left + (index - (len(systems) - 1) / 2) * width
            highest = max(highest, bar(axes, record, panel, base, system, task, x, width))
            if system == "llmc":
                diamond(right, record, panel, task, x, width)
    axes.set_ylim(0, highest * HEADROOM)
    rates = [rate.high for task in slots if (rate := record.rate(panel, "llmc", task))]
    limits = [limit for task in slots if record.rate(panel, "llmc", task) and (limit := record.limit(panel, task))]
    right.set_ylim(0, max([1e-9, *rates, *limits]) * HEADROOM)
    for task, left in slots.items():
        x = left + (len(systems) - 1) / 2 * width
        if base and (ratio := record.speedup(panel, "llmc", base, task)):
            label(axes, ratio, x, occupied(record, panel, task, right.get_ylim()[1]))
    dress(axes, right, panel, slots, base)


def in_order(panel: Panel) -> list[str]:
    """The baselines, then llmc.  What was measured at a few points alone is left to the table."""
    n_points = len(panel.batches) * len(panel.lengths)
    tasks = {name: {s.task for s in panel.samples if s.system == name} for name in panel.systems}
    n_decoded = {name: sum(task.startswith("decode") for task in each) for name, each in tasks.items()}
    few = {name for name, n in n_decoded.items() if 0 < n < FEW_POINTS * n_points}
    return [name for name in shown(panel) if name not in {"llmc", *few}] + ["llmc"]


def bar(
    axes: Axes, record: Record, panel: Panel, base: str | None, system: str, task: Task, x: float, width: float
) -> float:
    """A system's bar at a point, or the reason why there is none; how high it goes."""
    rate = record.rate(panel, system, task)
    if rate is None or base is None:
        words(axes, short_reason(panel, system, task) if rate is None else "", x)
        return 0.0
    if system == base:
        axes.bar(x, 1.0, width * 0.92, color=color(panel, system), zorder=2)
        return 1.0
    ratio = record.speedup(panel, system, base, task)
    if ratio is None:
        return 0.0
    axes.bar(x, ratio.median, width * 0.92, color=color(panel, system), zorder=2)
    reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
    axes.errorbar(x, ratio.median, reach, fmt="none", ecolor=INK, elinewidth=0.7, capsize=1.5, capthick=0.7, zorder=3)
    return ratio.high


def diamond(right: Axes, record: Record, panel: Panel, task: Task, x: float, width: float) -> None:
    """llmc's tokens a second, under a thin line at what the machine could give."""
    rate = record.rate(panel, "llmc", task)
    if rate is None:
        return
    right.plot(x, rate.median, "D", color=RED, markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, zorder=8)
    if limit := record.limit(panel, task):
        right.plot([x - width / 2, x + width / 2], [limit, limit], color=RED, linewidth=0.9, alpha=0.75, zorder=7)


def occupied(record: Record, panel: Panel, task: Task, top: float) -> list[tuple[float, float]]:
    """What llmc's diamond and its limit cover of the panel's height, in shares of it."""
    rate, limit = record.rate(panel, "llmc", task), record.limit(panel, task)
    spans = [(rate.median / top - 0.035, rate.median / top + 0.035)] if rate else []
    return spans + ([(limit / top - 0.01, limit / top + 0.01)] if limit else [])


def label(axes: Axes, ratio: Rate, x: float, spans: list[tuple[float, float]]) -> None:
    """How many times faster: above the bar, or above the marks that stand there."""
    bottom = ratio.high / axes.get_ylim()[1] + 0.015
    for low, high in sorted(spans):
        if low < bottom + LABEL_SHARE and bottom < high:
            bottom = high
    text = f"{ratio.median:.1f}×" if ratio.median < 99.5 else f"{ratio.median:.0f}×"
    written = axes.text(x, bottom, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=7.5)
    written.set(zorder=6, color="#1d4f86", path_effects=[withStroke(linewidth=1.6, foreground="white")])


def words(axes: Axes, text: str, x: float) -> None:
    axes.annotate(
        text,
        (x, 0),
        (0, 3),
        textcoords="offset points",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=6.5,
        color=FAINT,
    )


def short_reason(panel: Panel, system: str, task: Task) -> str:
    unfit = panel.unfit.get(f"{system} {task}")
    who = {"llmc": "", "hf": "HF "}.get(system, f"{system} ")
    if unfit is None:
        return f"{who}left out" if system in panel.left_out else f"{who}not measured"
    return f"{who}{unfit['reason']}" if "reason" in unfit else f"{who}needs {unfit['needs'] / 1e9:.0f} GB"


def color(panel: Panel, system: str) -> str:
    others = in_order(panel)[:-1]
    return BLUE if system == "llmc" else GRAYS[others.index(system) % len(GRAYS)]


def dress(axes: Axes, right: Axes, panel: Panel, slots: dict[Task, float], base: str | None) -> None:
    """Axes, ticks, labels, the title."""
    axes.set_xticks(list(slots.values()))
    marks = ["*" if task.length > panel.published_context else "" for task in slots]
    axes.set_xticklabels([in_k(t.length) + m for t, m in zip(slots, marks, strict=True)], fontsize=8)
    axes.set_xlim(-0.75, max(slots.values()) + 0.75)
    for batch in panel.batches:
        places = [place for task, place in slots.items() if task.batch == batch]
        middle = sum(places) / len(places)
        below: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"batch {batch}", (middle, 0), (0, -24), ha="center", va="top", fontsize=9, **below)
        axes.annotate(
            "",
            (places[0] - 0.45, -0.135),
            (places[-1] + 0.45, -0.135),
            xycoords=("data", "axes fraction"),
            textcoords=("data", "axes fraction"),
            arrowprops={"arrowstyle": "-", "color": "#cfcfcf", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
        )
    axes.set_ylabel(f"speed-up over {'HF' if base == 'hf' else base or 'nobody'} (×)", fontsize=9)
    right.set_ylabel("tokens per second", fontsize=9, color=RED)
    right.tick_params(axis="y", colors=RED, labelsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#ececec", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for each in (axes, right):
        each.spines["top"].set_visible(False)
    theirs = panel.systems.get(base or "", {}).get("precision", panel.precision)
    beside = "" if theirs == panel.precision else f" (HF: {theirs})" if base == "hf" else f" ({base}: {theirs})"
    axes.set_title(f"{panel.title}, {panel.precision}{beside}", loc="left", fontsize=11, fontweight="bold", pad=7)
    beyond = any(task.length > panel.published_context for task in slots)
    said = f"length in tokens; * beyond the model's own {panel.published_context} positions" if beyond else ""
    axes.annotate(
        said or "length in tokens",
        (1, 1),
        (0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=FAINT,
    )


def legend(figure: Figure, panels: Sequence[tuple[Record, Panel]], height: float) -> None:
    handles: dict[str, Any] = {}
    for _, panel in panels:
        for system in in_order(panel)[:-1]:
            known = SYSTEMS[system].label if system in SYSTEMS else system
            label = panel.systems.get(system, {}).get("label", known)
            handles.setdefault(label, Patch(color=color(panel, system)))
    handles["llmc"] = Patch(color=BLUE)
    handles["llmc, tokens per second"] = Line2D([], [], color=RED, marker="D", linestyle="", markersize=5.5)
    handles["limit of this machine"] = Line2D([], [], color=RED, linewidth=0.9, alpha=0.75)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="upper left",
        bbox_to_anchor=(0.06, 1 - 0.03 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        columnspacing=1.6,
    )


def foot(panels: Sequence[tuple[Record, Panel]]) -> str:
    """Each machine and date once."""
    lines: dict[str, list[float]] = {}
    for record, panel in panels:
        how = "copied" if "gpu" in record.machine else "read"
        key = f"{record.machine_in_words}, {record.date}, memory {how} at"
        lines.setdefault(key, []).append(record.bandwidth(panel) / 1e9)
    return " · ".join(f"{key} {min(rates):.0f} GB/s" for key, rates in lines.items())

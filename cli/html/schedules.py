"""The schedule of each operator at each number of rows, and where linear layers change theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmc.cli.html.artifact_facts import Facts
from llmc.cli.html.markup import Child, Markup, code, element, paragraph, section, table
from llmc.cli.output import in_bytes
from llmc.cli.schedules_view import FAMILIES, beat_in_words, share_in_words, switches, weight_in_words

Record = Mapping[str, Any]


def show(facts: Facts) -> Child:
    records: list[Record] = list(facts.manifest.get("schedules", ()))
    linear = [record for record in records if record.get("family")]
    others = [record for record in records if not record.get("family")]
    if not records:
        return None
    return section(
        "schedules",
        "Schedules",
        paragraph(
            "A schedule is how an operator of one shape is computed: its tiles, its loops, the layout of its weight. "
            "With few rows reading the weight is all the work; with many the arithmetic is. "
            "So linear layers change their kernel with the number of rows, M."
        ),
        matrix("linear layer", linear, lambda record: f"{bare(record)} {weight_in_words(record)}") if linear else None,
        switch_lines(records) if linear else None,
        element("h3", "Other operators") if linear and others else None,
        matrix("operator", others, bare) if others else None,
    )


def bare(record: Record) -> str:
    return str(record["op"]).removeprefix("llmc.")


def matrix(title: str, records: Iterable[Record], name: Any) -> Markup:
    """A line for each operator, a column for each number of rows."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        found.setdefault((record["plan"], name(record)), {})[record["m"]] = record
    sizes = sorted({m for row in found.values() for m in row})
    rows = [
        (element("span", code(said), element("small", f" {plan}")), *(cell(row.get(m)) for m in sizes))
        for (plan, said), row in sorted(found.items())
    ]
    return table((title, *(f"M = {m}" for m in sizes)), rows, class_="matrix")


def cell(record: Record | None) -> Markup:
    if record is None:
        return element("span", "", class_="none")
    family = record.get("family") or ""
    params = str(record.get("params", ""))
    tile = params.split(",")[0]
    found = record.get("measured") or {}
    about = [str(record.get("rule", "")), params, f"{record['nodes']} nodes, {in_bytes(record['bytes'])} each"]
    about += [f"layout {record['layout']}"] if record.get("layout") else []
    if found:
        where = f" between the calls of {found['in_place']}" if found.get("in_place") else ""
        about += [f"tuned{where}: {share_in_words(found)}", beat_in_words(found)]
    class_ = f"family{FAMILIES.index(family)}" if family in FAMILIES else "plain"
    return element(
        "span",
        element("b", family or str(record.get("rule", ""))),
        element("small", tile + (" · tuned" if found else "")),
        class_=f"cell {class_}",
        title="\n".join(filter(None, about)),
    )


def switch_lines(records: Iterable[Record]) -> Markup:
    """From which M on each weight's products are flat GEMM, and GEMM, in words."""
    lines = []
    for each in switches([dict(record) for record in records]):
        rows = each["rows"]
        said = "; ".join(
            f"{family} at M = {', '.join(map(str, rows[family]))}" for family in FAMILIES if family in rows
        )
        lines.append(element("li", element("code", each["weight"]), f" {said}"))
    return element("details", element("summary", "Switch points in words"), element("ul", lines))

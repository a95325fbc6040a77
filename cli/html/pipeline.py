"""What each pass did: nodes before and after it, and the rewrites it made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from llmc.cli.html.artifact_facts import Facts
from llmc.cli.html.markup import Child, Markup, element, paragraph, section, table


def show(facts: Facts) -> Child:
    passes: list[dict[str, Any]] = list(facts.graph.get("passes", ()))
    if not passes:
        return None
    first, last = passes[0], passes[-1]
    rows = [(element("code", first["name"]), "", "", first["nodes"], bar(first["nodes"], first["nodes"], passes))]
    rows += [
        (
            element("code", after["name"]),
            after["rewrites"] or element("span", "–", class_="quiet"),
            before["nodes"],
            after["nodes"],
            bar(before["nodes"], after["nodes"], passes),
        )
        for before, after in pairwise(passes)
    ]
    return section(
        "pipeline",
        "The pipeline",
        paragraph(
            f"{len(passes) - 1} passes turn the exported graph of ",
            element("strong", f"{first['nodes']} nodes"),
            " into a step graph of ",
            element("strong", f"{last['nodes']}"),
            ". Each makes its rewrites in place; the graph still runs in ONNX Runtime after every one.",
        ),
        table(("pass", "rewrites", "before", "after", "nodes"), rows, numeric=(1, 2, 3), class_="passes"),
    )


def bar(before: int, after: int, passes: list[dict[str, Any]]) -> Markup:
    """As wide as the nodes that are left; what the pass took away is pale."""
    most = max(1, max(p["nodes"] for p in passes))
    title = f"{before} → {after} nodes" if before != after else f"{after} nodes"
    kept, gone = 100 * min(before, after) / most, 100 * max(0, before - after) / most
    parts = [element("i", style=f"width:{kept:.1f}%")]
    if gone:
        parts.append(element("i", class_="gone", style=f"width:{gone:.1f}%"))
    if after > before:
        parts.append(element("i", class_="more", style=f"width:{100 * (after - before) / most:.1f}%"))
    return element("div", parts, class_="bar", title=title)

"""One layer of the graph, before and after the passes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmc.cli.html.artifact_facts import CATEGORIES, Facts, category
from llmc.cli.html.layer_drawing import Drawing, Node, parse, weight_label
from llmc.cli.html.markup import Child, Markup, element, figure, paragraph, section, table
from llmc.compiler.layer_text import one_layer


def show(facts: Facts) -> Child:
    """Both drawings; nothing for an artifact that keeps no graph."""
    after = parse(one_layer(str(facts.graph.get("final", ""))))
    before = parse(facts.graph.get("exported_layer", ()))
    if not after:
        return None
    pictures = []
    if before:
        picture = Drawing(before).draw("one layer as exported")
        pictures.append(figure(picture, f"As exported: {len(before)} nodes"))
    picture = Drawing(after).draw("one layer after the passes")
    pictures.append(element("div", figure(picture, f"After the passes: {len(after)} nodes"), operators(after)))
    used = {category(node.name) for node in [*before, *after]}
    return section(
        "layer",
        "One layer, before and after",
        paragraph(
            "PyTorch exports a layer operation by operation. " if before else "",
            "The passes fold it into the few operators that kernels are written for. The line on the left is the "
            "residual stream; a dot marks a product whose weight is turned around by a node of its own.",
        ),
        legend([name for name in CATEGORIES if name in used]),
        element("div", pictures, class_="pair"),
    )


def operators(nodes: Sequence[Node]) -> Markup:
    """The operators in words: what each reads besides its input, and what it makes."""
    rows = []
    for node in nodes:
        shapes = re.findall(r"([\w.{},]+)\[([\d,]+)\]", node.line.partition(" : ")[0])
        constants = [
            f"{weight_label(name)} {kind_of(name)}[{shape.replace(',', ', ')}]" for name, shape in shapes if "." in name
        ]
        made = node.line.rpartition(" : ")[2].partition("]")[0] + "]"
        rows.append((element("code", node.name), ", ".join(constants), element("code", made)))
    return table(("operator", "weight", "gives"), rows)


def kind_of(name: str) -> str:
    """What a constant is besides a plain weight: a bias, or how it is quantised."""
    last = name.rpartition(".")[2]
    return "" if last == "weight" else f"{last} "


def legend(categories: Sequence[str]) -> Markup:
    return element(
        "ul",
        [element("li", element("i", class_=f"chip {name}"), CATEGORIES[name]) for name in categories],
        class_="legend",
    )

"""A graph of some dozens of nodes as a drawing: a row below the rows it reads, the residual stream on the left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llmc.cli.html.artifact_facts import category
from llmc.cli.html.markup import Child, Markup, box, drawing, element, text

WIDTH, MIDDLE, LEFT, GAP = 420.0, 220.0, 14.0, 12.0
TOP, NODE_HEIGHT, STEP = 28.0, 29.0, 45.0
LINE = re.compile(r"(?P<results>.*?) = (?P<op>[\w.]+)\((?P<operands>.*)\) : (?P<types>.*)")
VALUE = re.compile(r"%[\w.]+")
WEIGHT = re.compile(r"(?<![%\w.])([a-zA-Z_][\w.{},]*)\[")
CACHE = ("%k_cache", "%v_cache")


class Node(NamedTuple):
    """A line of the graph's text.  inputs: values it reads; weights: the constants among its operands."""

    name: str
    results: list[str]
    inputs: list[str]
    weights: list[str]
    line: str


class Place(NamedTuple):
    """The middle of a box's upper side."""

    x: float
    y: float


def parse(lines: Sequence[str]) -> list[Node]:
    """Nodes of the graph's text; a line that is none is left out."""
    nodes = []
    for line in lines:
        found = LINE.match(line)
        if found:
            operands, name = found["operands"], found["op"].removeprefix("llmc.")
            values = VALUE.findall(found["results"]), VALUE.findall(operands)
            nodes.append(Node(name, *values, WEIGHT.findall(operands), line))
    return nodes


class Drawing:
    """Nodes in the order they run, with their places.

    A node that only prepares a weight is no box of its own, but a dot on the box that uses it.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.maker = {result: index for index, node in enumerate(nodes) for result in node.results}
        self.stream = {value for value in nodes[0].inputs if value not in self.maker}
        self.preparing = {
            index
            for index, node in enumerate(nodes)
            if node.weights and not node.inputs and category(node.name) == "movement"
        }
        self.places = self._place()

    def draw(self, label: str) -> Markup:
        bottom = max(place.y for place in self.places.values()) + NODE_HEIGHT
        height = bottom + STEP + 16
        ends = (
            text(MIDDLE, 12, "from the layer below", "end", "middle"),
            text(MIDDLE, height - 6, "to the layer above", "end", "middle"),
        )
        edges = [edge for index in self.places for edge in self._edges_into(index)]
        boxes = [self._box(index) for index in self.places]
        return drawing(
            WIDTH, height, edges, self._edges_out(bottom + STEP - 12), boxes, ends, label=label, class_="layer"
        )

    def _place(self) -> dict[int, Place]:
        """A row for each node: one below the lowest of those it reads.  In a row, each near what it reads."""
        ranks: dict[int, int] = {}
        for index in range(len(self.nodes)):
            if index not in self.preparing:
                ranks[index] = 1 + max((ranks[i] for i in self._sources(index)), default=-1)
        places: dict[int, Place] = {}
        for rank in range(max(ranks.values()) + 1):
            row = [index for index in ranks if ranks[index] == rank]
            above = {index: [places[i].x for i in self._sources(index)] for index in row}
            row.sort(key=lambda index: (sum(above[index]) / len(above[index]) if above[index] else MIDDLE, index))
            left = MIDDLE - (sum(map(self._width, row)) + GAP * (len(row) - 1)) / 2
            for index in row:
                places[index] = Place(left + self._width(index) / 2, TOP + rank * STEP)
                left += self._width(index) + GAP
        return places

    def _sources(self, index: int) -> list[int]:
        """The boxes that a node reads."""
        made = [self.maker[value] for value in self.nodes[index].inputs if value in self.maker]
        return [source for source in dict.fromkeys(made) if source not in self.preparing]

    def _prepared(self, index: int) -> list[Node]:
        """The nodes that prepare its weights."""
        made = [self.maker.get(value, -1) for value in self.nodes[index].inputs]
        return [self.nodes[source] for source in made if source in self.preparing]

    def _weights(self, index: int) -> list[str]:
        return [name for node in [self.nodes[index], *self._prepared(index)] for name in node.weights]

    def _width(self, index: int) -> float:
        """As its name and its weight's need, within reason."""
        weights = self._weights(index)
        needed = 6.0 * len(weight_label(weights[0])) if weights else 0.0
        return min(176.0, max(98.0, 7.6 * len(self.nodes[index].name) + 18, needed + 18))

    def _box(self, index: int) -> Markup:
        node, (x, y) = self.nodes[index], self.places[index]
        prepared, weights, width = self._prepared(index), self._weights(index), self._width(index)
        parts: list[Child] = [
            element("title", "\n".join([node.line, *(each.line for each in prepared)])),
            box(x - width / 2, y, width, NODE_HEIGHT, f"node {category(node.name)}", round_=5),
            text(x, y + (13 if weights else 19), fitted(node.name, 22), "name", "middle"),
        ]
        if weights:
            parts.append(text(x, y + 24, fitted(weight_label(weights[0]), 28), "weight", "middle"))
        if prepared:
            parts.append(element("circle", cx=x + width / 2 - 7, cy=y + 7, r=2.5, class_="dot"))
        if any(value.startswith(CACHE) for value in node.inputs):
            parts.append(text(x + width / 2 + 8, y + 19, "↔ KV cache", "tick"))
        return element("g", parts)

    def _edges_into(self, index: int) -> list[Markup]:
        place = self.places[index]
        edges = [
            edge(Place(source.x, source.y + NODE_HEIGHT), place, (place.y - source.y) / STEP)
            for source in (self.places[i] for i in self._sources(index))
        ]
        if self.stream.intersection(self.nodes[index].inputs):
            edges.append(edge(Place(MIDDLE, 17), place, (place.y - 17) / STEP))
        return edges

    def _edges_out(self, y: float) -> list[Markup]:
        """Edges from each node with a result that nobody in this layer reads; the cache stays in its pages."""
        read = {value for node in self.nodes for value in node.inputs}
        return [
            edge(Place(place.x, place.y + NODE_HEIGHT), Place(MIDDLE, y), (y - place.y) / STEP)
            for index, place in self.places.items()
            if any(not r.startswith(CACHE) and r not in read for r in self.nodes[index].results)
        ]


def edge(start: Place, end: Place, rows: float) -> Markup:
    """A line to the next row; past other rows down its own column and then across.  When both ends stand in the middle:
    around one box on its right, around more on the left."""
    if rows > 2.5 and abs(start.x - MIDDLE) < 40 and abs(end.x - MIDDLE) < 40:
        turn = 12.0
        path = (
            f"M {start.x:.0f} {start.y:.0f} C {start.x:.0f} {start.y + turn:.0f} {LEFT:.0f} {start.y:.0f} "
            f"{LEFT:.0f} {start.y + 2 * turn:.0f} L {LEFT:.0f} {end.y - 2 * turn:.0f} "
            f"C {LEFT:.0f} {end.y:.0f} {end.x:.0f} {end.y - turn:.0f} {end.x:.0f} {end.y:.0f}"
        )
        return element("path", d=path, class_="edge stream")
    if rows > 1.5 and abs(start.x - end.x) < 40:
        aside = max(start.x, end.x) + 90
        curve = f"C {aside:.0f} {start.y + 4:.0f} {aside:.0f} {end.y - 4:.0f} {end.x:.0f} {end.y:.0f}"
        return element("path", d=f"M {start.x:.0f} {start.y:.0f} {curve}", class_="edge")
    turn = max(start.y, end.y - (STEP - NODE_HEIGHT))
    bend = (end.y - turn) / 2
    curve = f"C {start.x:.0f} {turn + bend:.0f} {end.x:.0f} {end.y - bend:.0f} {end.x:.0f} {end.y:.0f}"
    return element("path", d=f"M {start.x:.0f} {start.y:.0f} L {start.x:.0f} {turn:.0f} {curve}", class_="edge")


def weight_label(name: str) -> str:
    """{q,k,v}_proj of model.layers.1.self_attn.{q,k,v}_proj.weight, or of ….weight.int8 where it is quantised."""
    parts = re.split(r"\.(?![^{]*\})", name)
    ends = [index for index, part in enumerate(parts) if part in ("weight", "bias")]
    return parts[(ends[0] if ends else len(parts)) - 1]


def fitted(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"

"""A deep model's graph from that of its first layers.

Exporting costs a second or two a layer, and the layers of most models are one layer repeated, or a few in turns: with a
window and without one, say, behind one or two of another kind.  So what is there before the repetition is exported, and
two rounds of it; where the second round differs from the first in nothing but the layers' indices, it is repeated.  A
constant that depends on the index, a value that skips a round: then the model is exported whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PretrainedConfig

LAYER = "llmc.layer"


class LayersDifferError(Exception):
    """The layers are no repetition, so far as those that were exported show."""


@dataclass(frozen=True)
class Repetition:
    """n_first layers, at least one, and then rounds of `period` layers each.  The first layers count as round 0."""

    n_first: int
    period: int

    @property
    def n_exported(self) -> int:
        return self.n_first + 2 * self.period

    def round_of(self, layer: int) -> int:
        """The round of a layer, counted from 0."""
        return 0 if layer < self.n_first else 1 + (layer - self.n_first) // self.period


def shorten(config: PretrainedConfig) -> tuple[PretrainedConfig, Repetition] | None:
    """The configuration of the layers to be exported, and how they repeat; None where that saves nothing, or some
    layers attend the keys and values of others far in front."""
    if getattr(config, "num_kv_shared_layers", None):
        return None
    n_layers = config.num_hidden_layers
    lists, chosen = dict[str, list[object]](), dict[str, list[int]]()
    for name, value in config.to_dict().items():
        if name.endswith("layers") and isinstance(value, list) and value and are_indices(value, n_layers):
            chosen[name] = value
        elif isinstance(value, list | tuple) and len(value) == n_layers:
            lists[name] = list(value)
    n_dense = getattr(config, "first_k_dense_replace", None) or 0
    kinds = [
        (layer < n_dense, *(str(v[layer]) for v in lists.values()), *(layer in v for v in chosen.values()))
        for layer in range(n_layers)
    ]
    found = min(repetitions(kinds), key=lambda found: (found.n_exported, found.period), default=None)
    if found is None:
        return None
    short = copy.deepcopy(config)
    short.num_hidden_layers = found.n_exported
    for name, value in lists.items():
        setattr(short, name, value[: found.n_exported])
    for name, indices in chosen.items():
        setattr(short, name, [index for index in indices if index < found.n_exported])
    return short, found


def are_indices(value: list[object], n_layers: int) -> bool:
    """Whether a list names layers (`moe_layers`), rather than say something of each."""
    numbers = [number for number in value if isinstance(number, int) and 0 <= number < n_layers]
    return len(numbers) == len(value) and numbers == sorted(set(numbers))


def repetitions(kinds: list[tuple[object, ...]]) -> Iterator[Repetition]:
    """All that layers of these kinds may be, of which fewer are exported than there are."""
    n = len(kinds)
    for period in range(1, n // 2):
        unlike = [layer for layer in range(n - period) if kinds[layer] != kinds[layer + period]]
        n_first = max(unlike, default=0) + 1
        found = Repetition(n_first + (n - n_first) % period, period)
        if found.n_exported < n - 1:
            yield found


def repeat_layers(model: ir.Model, layers: str, n_layers: int, how: Repetition) -> None:
    """Repeat the second round until there are `n_layers`.  In place; raises LayersDifferError before any change.

    layers: how the names of the layers' weights begin, up to the index: "model.layers.".
    """
    index = re.compile(re.escape(layers) + r"(\d+)\.")
    depth = _depths(model.graph, index, how)
    first = [node for node in model.graph if depth[node] == 1]
    second, tail = _split([node for node in model.graph if depth[node] == 2], len(first))
    later = _match(first, second, index, how.period)
    results = {value for node in second for value in node.outputs}
    _check_boundary(model.graph, second, tail, depth, later)

    latest = {value: value for value in results}  # of the second round -> the same of the round made last
    last = second[-1]
    for number in range(3, how.round_of(n_layers)):
        # A round takes from the one before it what the second takes from the first.
        known = {value: latest[later[value]] for node in second for value in node.inputs if value in later and value}
        clones = [_clone(model.graph, node, known, index, number, (number - 2) * how.period) for node in second]
        model.graph.insert_after(last, clones)
        last = clones[-1]
        latest = {value: known[value] for value in results}
    for node in tail:
        for position, value in enumerate(node.inputs):
            if value in latest:
                node.replace_input_with(position, latest[value])


def _depths(graph: ir.Graph, index: re.Pattern[str], how: Repetition) -> dict[ir.Node, int]:
    """For each node, the last round whose weights it depends on; -1 for none."""
    depth: dict[ir.Node, int] = {}
    for node in graph:
        depth[node] = max((_depth(value, depth, index, how) for value in node.inputs if value), default=-1)
    return depth


def _depth(value: ir.Value, depth: Mapping[ir.Node, int], index: re.Pattern[str], how: Repetition) -> int:
    producer = value.producer()
    if producer is not None:
        return depth[producer]
    weight = index.match(value.name or "")
    return how.round_of(int(weight[1])) if weight else -1


def _split(nodes: list[ir.Node], n: int) -> tuple[list[ir.Node], list[ir.Node]]:
    if not 0 < n <= len(nodes):
        raise LayersDifferError
    return nodes[:n], nodes[n:]


def _match(
    first: list[ir.Node], second: list[ir.Node], index: re.Pattern[str], period: int
) -> dict[ir.Value, ir.Value]:
    """What the second round has where the first has a value: results of its own, and what it takes from the round
    before it.  Refuses any other difference."""
    later: dict[ir.Value, ir.Value] = {}
    for one, other in zip(first, second, strict=True):
        if _signature(one, period) != _signature(other, 0):
            raise LayersDifferError
        for value, corresponding in zip(one.inputs, other.inputs, strict=True):
            if value is corresponding:
                continue
            if value is None or corresponding is None:
                raise LayersDifferError
            if value.producer() is None:
                if _renamed(value, index, period) != corresponding.name:
                    raise LayersDifferError
            elif later.setdefault(value, corresponding) is not corresponding:
                raise LayersDifferError
        later.update(zip(one.outputs, other.outputs, strict=True))
    return later


def _signature(node: ir.Node, offset: int) -> tuple[object, ...]:
    """Everything about a node, so many layers later, but what it is connected to."""
    attributes = [(name, attribute.type, str(attribute.value)) for name, attribute in sorted(node.attributes.items())]
    shapes = [(value.dtype, str(value.shape)) for value in node.outputs]
    return node.domain, node.op_type, attributes, _metadata(node, offset), shapes, len(node.inputs)


def _metadata(node: ir.Node, offset: int) -> dict[str, str]:
    """A node's metadata as it is so many layers later."""
    moved = {LAYER: str(int(node.metadata_props[LAYER]) + offset)} if LAYER in node.metadata_props else {}
    return {**node.metadata_props, **moved}


def _check_boundary(
    graph: ir.Graph,
    second: list[ir.Node],
    tail: list[ir.Node],
    depth: Mapping[ir.Node, int],
    later: Mapping[ir.Value, ir.Value],
) -> None:
    """Each round takes values from the one before it alone; what comes after them all, from the last alone."""
    within = set(second)
    for node in second:
        for value in node.inputs:
            producer = value.producer() if value else None
            if producer is None or producer in within or depth[producer] == -1:
                continue
            if depth[producer] != 1 or value not in later:
                raise LayersDifferError
    from_earlier = [v for node in tail for v in node.inputs if v and (p := v.producer()) and depth[p] in (0, 1)]
    if from_earlier or any(value.producer() in within for value in graph.outputs):
        raise LayersDifferError


def _clone(
    graph: ir.Graph, node: ir.Node, known: dict[ir.Value, ir.Value], index: re.Pattern[str], number: int, offset: int
) -> ir.Node:
    """The node of the second round as it is in round `number`, `offset` layers later.  known: this round's value for
    the second's; its results are added."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None or value in known:
            inputs.append(known[value] if value else None)
        elif index.match(value.name or ""):
            inputs.append(_weight(graph, value, _renamed(value, index, offset)))
        else:
            inputs.append(value)
    clone = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        outputs=[_renamed_copy(value, f"{value.name}.{number}") for value in node.outputs],
        version=node.version,
        name=f"{node.name}.{number}",
        metadata_props=_metadata(node, offset),
    )
    known.update(zip(node.outputs, clone.outputs, strict=True))
    return clone


def _weight(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers[name] = _renamed_copy(value, name)
    return graph.initializers[name]


def _renamed_copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape and ir.Shape(value.shape), type=value.type)


def _renamed(value: ir.Value, index: re.Pattern[str], offset: int) -> str:
    """The weight's name so many layers later."""
    name = value.name or ""
    weight = index.match(name)
    return f"{name[: weight.start(1)]}{int(weight[1]) + offset}{name[weight.end(1) :]}" if weight else name

"""A deep model's graph from that of its first three layers.

Exporting costs a second or two a layer, and the layers of most models are one layer repeated. So three are exported;
where the second and the third differ in nothing but their index, the third is repeated.  A constant that depends on the
index, layers of several kinds, a value that skips a layer: then the model is exported whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import onnx_ir as ir
from transformers import PretrainedConfig

N_EXPORTED = 3
LAYER = "llmc.layer"


class LayersDifferError(Exception):
    """The model is not one layer repeated, so far as its first three layers show."""


def shorten(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of three layers; None where that saves nothing, or the layers are of several kinds."""
    n_layers = config.num_hidden_layers
    if n_layers <= N_EXPORTED + 1:
        return None
    short = copy.deepcopy(config)
    short.num_hidden_layers = N_EXPORTED
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == n_layers:
            if len(set(map(str, value))) > 1:
                return None
            setattr(short, name, list(value[:N_EXPORTED]))
    return short


def repeat_layers(model: ir.Model, layers: str, n_layers: int) -> None:
    """Repeat the third layer until there are `n_layers`.  In place; raises LayersDifferError before any change.

    layers: how the names of the layers' weights begin, up to the index: "model.layers.".
    """
    index = re.compile(re.escape(layers) + r"(\d+)\.")
    depth = _depths(model.graph, index)
    second = [node for node in model.graph if depth[node] == 1]
    third, tail = _split([node for node in model.graph if depth[node] == 2], len(second))
    later = _match(second, third, index)
    results = {value for node in third for value in node.outputs}
    _check_boundary(model.graph, third, tail, depth, later)

    latest = {value: value for value in results}  # of the third layer -> the same of the layer made last
    last = third[-1]
    for layer in range(N_EXPORTED, n_layers):
        # A layer takes from the one before it what the third takes from the second.
        known = {value: latest[later[value]] for node in third for value in node.inputs if value in later and value}
        clones = [_clone(model.graph, node, known, index, layer) for node in third]
        model.graph.insert_after(last, clones)
        last = clones[-1]
        latest = {value: known[value] for value in results}
    for node in tail:
        for position, value in enumerate(node.inputs):
            if value in latest:
                node.replace_input_with(position, latest[value])


def _depths(graph: ir.Graph, index: re.Pattern[str]) -> dict[ir.Node, int]:
    """For each node, the last layer whose weights it depends on; -1 for none."""
    depth: dict[ir.Node, int] = {}
    for node in graph:
        depth[node] = max((_depth(value, depth, index) for value in node.inputs if value), default=-1)
    return depth


def _depth(value: ir.Value, depth: Mapping[ir.Node, int], index: re.Pattern[str]) -> int:
    producer = value.producer()
    if producer is not None:
        return depth[producer]
    weight = index.match(value.name or "")
    return int(weight[1]) if weight else -1


def _split(nodes: list[ir.Node], n: int) -> tuple[list[ir.Node], list[ir.Node]]:
    if not 0 < n <= len(nodes):
        raise LayersDifferError
    return nodes[:n], nodes[n:]


def _match(second: list[ir.Node], third: list[ir.Node], index: re.Pattern[str]) -> dict[ir.Value, ir.Value]:
    """What the third layer has where the second has a value: results of its own, and what it takes from the layer
    before it.  Refuses any other difference."""
    later: dict[ir.Value, ir.Value] = {}
    for one, other in zip(second, third, strict=True):
        if _signature(one, 1) != _signature(other, 2):
            raise LayersDifferError
        for value, corresponding in zip(one.inputs, other.inputs, strict=True):
            if value is corresponding:
                continue
            if value is None or corresponding is None:
                raise LayersDifferError
            if value.producer() is None:
                if _renamed(value, index, 2) != corresponding.name:
                    raise LayersDifferError
            elif later.setdefault(value, corresponding) is not corresponding:
                raise LayersDifferError
        later.update(zip(one.outputs, other.outputs, strict=True))
    return later


def _signature(node: ir.Node, layer: int) -> tuple[object, ...]:
    """Everything about a node but what it is connected to, and the index of its layer."""
    attributes = [(name, attribute.type, str(attribute.value)) for name, attribute in sorted(node.attributes.items())]
    metadata = {key: text for key, text in node.metadata_props.items() if (key, text) != (LAYER, str(layer))}
    shapes = [(value.dtype, str(value.shape)) for value in node.outputs]
    return node.domain, node.op_type, attributes, metadata, shapes, len(node.inputs)


def _check_boundary(
    graph: ir.Graph,
    third: list[ir.Node],
    tail: list[ir.Node],
    depth: Mapping[ir.Node, int],
    later: Mapping[ir.Value, ir.Value],
) -> None:
    """Each layer takes values from the one before it alone; what comes after them all, from the last alone."""
    within = set(third)
    for node in third:
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
    graph: ir.Graph, node: ir.Node, known: dict[ir.Value, ir.Value], index: re.Pattern[str], layer: int
) -> ir.Node:
    """The node as it is in another layer.  known: this layer's value for the third's; its results are added."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None or value in known:
            inputs.append(known[value] if value else None)
        elif index.match(value.name or ""):
            inputs.append(_weight(graph, value, _renamed(value, index, layer)))
        else:
            inputs.append(value)
    clone = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        outputs=[_renamed_copy(value, f"{value.name}.{layer}") for value in node.outputs],
        version=node.version,
        name=f"{node.name}.{layer}",
        metadata_props={**node.metadata_props, **({LAYER: str(layer)} if LAYER in node.metadata_props else {})},
    )
    known.update(zip(node.outputs, clone.outputs, strict=True))
    return clone


def _weight(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers[name] = _renamed_copy(value, name)
    return graph.initializers[name]


def _renamed_copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape and ir.Shape(value.shape), type=value.type)


def _renamed(value: ir.Value, index: re.Pattern[str], layer: int) -> str:
    """The weight's name in another layer."""
    name = value.name or ""
    weight = index.match(name)
    return f"{name[: weight.start(1)]}{layer}{name[weight.end(1) :]}" if weight else name

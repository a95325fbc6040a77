"""Names in an exported graph: the checkpoint's for weights, batch and sequence for sizes; remarks are dropped."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel


def number_layers(graph: ir.Graph) -> None:
    """Number attentions that do not know their layer in the order in which they come."""
    for number, node in enumerate(node for node in graph if "llmc.layer" in node.metadata_props):
        if not node.metadata_props["llmc.layer"]:
            node.metadata_props["llmc.layer"] = str(number)


def name_constants(graph: ir.Graph) -> None:
    """Give constants names of no layer: one that all layers share has been named after the first."""
    constants = [value for value in graph.initializers.values() if value.const_value is not None]
    for number, value in enumerate(constants):
        value.name = f"constant.{number}"


def forget_weights(graph_model: ir.Model, model: PreTrainedModel) -> None:
    """Leave the checkpoint's tensors without a value, so that nothing folds, merges or reads them."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(tensor), []).append(name)
    shared = {name: names for names in names_of.values() for name in names}
    initializers = graph_model.graph.initializers
    for name, value in list(initializers.items()):
        if name in shared:
            del initializers[name]
            value.const_value = None
            value.name, *tied = shared[name]
            initializers[value.name] = value
            if tied:
                value.metadata_props["llmc.tied"] = " ".join(tied)
        elif value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=name)


def rename_dims(model: ir.Model) -> None:
    """Call the symbolic dimensions batch and sequence, as the inputs mean them."""
    input_shape = model.graph.inputs[0].shape
    assert input_shape is not None
    names = {str(dim): name for dim, name in zip(input_shape, ("batch", "sequence"), strict=True)}
    words = re.compile(r"\b(" + "|".join(names) + r")\b")
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else words.sub(lambda m: names[m[0]], str(dim)) for dim in value.shape]
            value.shape = ir.Shape(dims)


def drop_remarks(model: ir.Model) -> None:
    """Keep only our own metadata: the exporter leaves stack traces, with the paths of this machine."""
    graph = model.graph
    things: list[Any] = [
        model,
        graph,
        *graph,
        *graph.inputs,
        *graph.initializers.values(),
        *(v for n in graph for v in n.outputs),
    ]
    for thing in things:
        for key in [key for key in thing.metadata_props if not key.startswith("llmc.")]:
            del thing.metadata_props[key]
    for node in graph:
        node.doc_string = None

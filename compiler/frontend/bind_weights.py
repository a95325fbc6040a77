"""Give a graph's initializers their weights: from a checkpoint by name, or made up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.config import parse_config, parse_whole
from llmc.compiler.frontend.random_weights import random_weight
from llmc.compiler.weights import StoredDType, Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend.convert_checkpoint import ConvertedTensor


def random_weights(graph: ir.Model, dtype: StoredDType, *, std: float, seed: int) -> dict[str, Weight]:
    """A random weight for each initializer without a value, under all of its names."""
    tensors: dict[str, Weight] = {}
    for value in unread(graph):
        weight = random_weight(value.name or "", dims(value), dtype, std=std, seed=seed)
        tensors.update(dict.fromkeys(names(value), weight))
    return tensors


def checkpoint_weights(
    graph: ir.Model,
    checkpoint: Mapping[str, StoredTensor],
    fields: dict[str, Any],
    *,
    place: str,
    is_whole: bool = False,
) -> dict[str, Weight]:
    """The checkpoint's tensor for each initializer without a value, under all of its names.

    fields: of config.json.  Where the checkpoint has other names than the model, or other pieces, transformers' table
    of such changes is asked (convert_checkpoint.py, which imports torch).  is_whole: of a model that has a text part.
    Refuses a tensor that is missing, has another shape than the model's, or a dtype that is not a plain float.
    """
    prefix = graph.metadata_props["llmc.prefix"]
    tensors, missing = _bind(graph, checkpoint, prefix)
    if missing:
        convert = import_module("llmc.compiler.frontend.convert_checkpoint")
        wanted = {spelling for value in unread(graph) for spelling in spellings(names(value), prefix)}
        if is_whole:
            changes = convert.changes_of_whole(config := parse_whole(fields, place))
        else:
            config = parse_config(fields, place)
            changes = convert.changes_of(graph.metadata_props["llmc.architecture"], config)
        converted = convert.convert_checkpoint(checkpoint, wanted, changes, config)
        tensors, missing = _bind(graph, converted, prefix)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise LlmcError(f"the checkpoint lacks the tensor {missing[0]!r}{more}", place=place)
    return tensors


def _bind(
    graph: ir.Model, checkpoint: Mapping[str, StoredTensor | ConvertedTensor], prefix: str
) -> tuple[dict[str, Weight], list[str]]:
    """Weights by name, and the names of those that the checkpoint lacks."""
    tensors: dict[str, Weight] = {}
    missing: list[str] = []
    for value in unread(graph):
        stored = next((checkpoint[name] for name in spellings(names(value), prefix) if name in checkpoint), None)
        if stored is None:
            missing.append(value.name or "")
        elif stored.dims != dims(value):
            raise LlmcError(
                f"tensor {stored.name!r} has shape {list(stored.dims)}; the configuration makes it {list(dims(value))}",
                place=str(stored.file),
                hint="config.json and the weights are not of the same model",
            )
        else:
            tensors.update(dict.fromkeys(names(value), stored.weight(value.name or "")))
    return tensors, missing


def unread(graph: ir.Model) -> list[ir.Value]:
    """The initializers that have no value yet."""
    return [value for value in graph.graph.initializers.values() if value.const_value is None]


def names(value: ir.Value) -> list[str]:
    """What the model calls a weight: one name for each module that shares it."""
    return [value.name or "", *value.metadata_props.get("llmc.tied", "").split()]


def spellings(names: list[str], prefix: str) -> Iterator[str]:
    """How a checkpoint may call it: checkpoints of the bare decoder leave its name within the whole model out
    (OPT's hub files have `decoder.…` for `model.decoder.…`), others put it where the model has none."""
    for name in names:
        yield name
        yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"


def dims(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer, which is always known."""
    assert value.shape is not None
    return tuple(int(str(size)) for size in value.shape)

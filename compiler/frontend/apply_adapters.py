"""Adapters find their weights: by the names of the model's modules, or by those of the checkpoint's tensors.

An adapter speaks of modules as transformers had them when it was trained.  Where they are the model's still, its
weights are changed; where a checkpoint holds other pieces, as Mixtral's has a tensor for each expert, its tensors are,
before they are put together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from llmc.compiler.frontend.adapter import Adapter, short
from llmc.compiler.frontend.bind_weights import checkpoint_weights, names, spellings, unread
from llmc.compiler.frontend.bind_weights import dims as dims_of
from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.graph_cache import exported_graph
from llmc.compiler.frontend.merge_adapter import Change, LowRank, MergedTensor, merged_weight
from llmc.compiler.frontend.text_part import text_tensors
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError, shortened

TIES = "tie_word_embeddings"


@dataclass(frozen=True)
class Bound:
    """A model whose weights are known: its configuration, graph and weights by name.  notes: what the user should be
    told."""

    fields: dict[str, Any]
    graph: ir.Model
    weights: dict[str, Weight]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merge:
    """of_weights, of_tensors: the changes of each, one after another, by the model's and by the checkpoint's names.
    notes: as above."""

    of_weights: Mapping[str, Sequence[Change]]
    of_tensors: Mapping[str, Sequence[Change]]
    notes: tuple[str, ...]

    def tensors(self, checkpoint: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The checkpoint with its changed tensors; reads none."""
        merged = dict(checkpoint)
        for name, changes in self.of_tensors.items():
            base = checkpoint[name]
            stored = (base.name, base.file, base.dtype, base.dims, base.offset, base.n_bytes)
            merged[name] = MergedTensor(*stored, base, tuple(changes))
        return merged

    def weights(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The model's weights with those that are changed; reads none."""
        changed = {name: merged_weight(weights[name], changes) for name, changes in self.of_weights.items()}
        return {**weights, **changed}


def bind(
    graph: ir.Model,
    checkpoint: Mapping[str, StoredTensor],
    fields: dict[str, Any],
    adapters: Sequence[Adapter],
    *,
    is_part: bool,
    place: str,
) -> Bound:
    """The checkpoint's weights with the adapters, if any, merged into them; reads none.  The configuration and the
    graph are others than those given where modules no longer share a tensor."""
    if not adapters:
        return Bound(fields, graph, checkpoint_weights(graph, checkpoint, fields, place=place))
    fields, graph, checkpoint = untie(fields, graph, checkpoint, adapters, is_part=is_part, place=place)
    merge = find_weights(graph, checkpoint, adapters, is_part=is_part)
    weights = checkpoint_weights(graph, merge.tensors(checkpoint), fields, place=place)
    return Bound(fields, graph, merge.weights(weights), merge.notes)


def untie(
    fields: dict[str, Any],
    graph: ir.Model,
    checkpoint: Mapping[str, StoredTensor],
    adapters: Sequence[Adapter],
    *,
    is_part: bool,
    place: str,
) -> tuple[dict[str, Any], ir.Model, Mapping[str, StoredTensor]]:
    """Give modules that share a tensor one each, if an adapter changes one of them alone."""
    prefix = graph.metadata_props["llmc.prefix"]
    tied = [names(value) for value in unread(graph) if len(names(value)) > 1]
    known = {name for group in tied for name in group}
    touching = [
        adapter for adapter in adapters if any(_spelled(name, known, prefix) for name in _own(adapter, is_part=is_part))
    ]
    if not touching:
        return fields, graph, checkpoint
    if any(adapter.ties for adapter in touching):
        fact = "the adapter cannot be merged: ensure_weight_tying is not supported where it changes tied weights"
        raise LlmcError(fact, place=str(touching[0].folder))
    fields = {**fields, TIES: False}
    graph = exported_graph(fields, place)
    if any(len(names(value)) > 1 for value in unread(graph)):
        fact = "the adapter cannot be merged: it changes one of two modules that share their weights"
        raise LlmcError(fact, place=str(touching[0].folder))
    pieces = dict(checkpoint)
    for group in tied:
        stored = next((checkpoint[name] for name in spellings(group, prefix) if name in checkpoint), None)
        pieces.update(dict.fromkeys(group, stored) if stored else {})
    return fields, graph, pieces


def find_weights(
    graph: ir.Model, checkpoint: Mapping[str, StoredTensor], adapters: Sequence[Adapter], *, is_part: bool
) -> Merge:
    """Whose changes they are.  Refuses one of what neither the model nor the checkpoint has, or of another shape."""
    prefix = graph.metadata_props["llmc.prefix"]
    known = {name: value for value in unread(graph) for name in names(value)}
    of_weights: dict[str, list[Change]] = {}
    of_tensors: dict[str, list[Change]] = {}
    notes: list[str] = []
    for adapter in adapters:
        own, missing = _own(adapter, is_part=is_part), []
        for name, changes in own.items():
            if weight := _spelled(name, known, prefix):
                turned = [_turned(change, known[weight]) for change in changes]
                of_weights.setdefault(weight, []).extend(fitting(turned, name, dims_of(known[weight])))
            elif tensor := _spelled(name, checkpoint, prefix):
                of_tensors.setdefault(tensor, []).extend(fitting(changes, name, checkpoint[tensor].dims))
            else:
                missing.append(name)
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            fact = f"the adapter changes {short(missing[0])}{more}, which the model does not have"
            raise LlmcError(fact, place=str(adapter.folder), hint="it is for another model")
        notes += _without_tensors(adapter, [*known, *checkpoint])
        if n_left := len(adapter.changes) - len(own):
            notes.append(f"{n_left} changes of the adapter {adapter.name} are not of the text part, and are left out")
    return Merge(of_weights, of_tensors, tuple(notes))


def fitting(changes: Sequence[Change], name: str, dims: tuple[int, ...]) -> Sequence[Change]:
    """The changes, after it is sure that they are for a weight of this shape."""
    for change in changes:
        change.check(name, dims)
    return changes


def _turned(change: Change, weight: ir.Value) -> Change:
    """The change of a weight [in, out] where the graph multiplies by it as it lies, and of one [out, in] where not."""
    if not isinstance(change, LowRank) or change.of_embedding:
        return change
    as_it_lies = any(
        use.idx == 1 and use.node.op_type in ("MatMul", "Gemm") and not use.node.attributes.get_int("transB", 0)
        for use in weight.uses()
    )
    return replace(change, flips=as_it_lies)


def _own(adapter: Adapter, *, is_part: bool) -> Mapping[str, tuple[Change, ...]]:
    """An adapter's changes; of the text part alone, and under its names, where only that is compiled."""
    return text_tensors(adapter.changes) if is_part else adapter.changes


def _spelled(name: str, known: Collection[str], prefix: str) -> str | None:
    return next((spelling for spelling in spellings([name], prefix) if spelling in known), None)


def _without_tensors(adapter: Adapter, known: Sequence[str]) -> list[str]:
    """What to tell of target modules that the adapter lists and has no tensors for: nothing in this model has such a
    name.  Refuses one that something has: the file lacks its tensors."""
    changed = [f".{name}" for name in adapter.changes]
    unmet = [target for target in adapter.targets if not any(f".{target}." in name for name in changed)]
    for target in unmet:
        if any(f".{name}".endswith(f".{target}.weight") for name in known):
            fact = f"the adapter lacks the tensors of {short(target)}, which its target_modules names"
            raise LlmcError(fact, place=str(adapter.folder), hint="save it again")
    fact = f"the adapter {adapter.name} names a target module that the model has not"
    return [f"{fact}: {shortened(target)}" for target in unmet]

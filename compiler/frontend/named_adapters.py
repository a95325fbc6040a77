"""Adapters that stay beside a model's weights, each under a name that a sequence chooses it by.

They have to be what a product with a token's own matrices can add: two thin matrices for each of some linear layers.
Whatever else adapters change is refused here, with the way out: merged into the weights it may be anything
(apply_adapters.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmc.compiler.frontend.adapter import Adapter, short
from llmc.compiler.frontend.apply_adapters import find_weights
from llmc.compiler.frontend.bind_weights import names, unread
from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.merge_adapter import Change, LowRank, merged_weight
from llmc.compiler.low_rank import Added, Factors
from llmc.compiler.weights import Array, Weight
from llmc.runtime.errors import LlmcError, shortened
from llmc.runtime.format import MAX_ADAPTER_NAME, MAX_ADAPTERS

if TYPE_CHECKING:
    from llmc.compiler.frontend.source import SourceModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MERGE = "merge it into the weights: --adapter FOLDER, without a name"


@dataclass(frozen=True)
class NamedAdapter:
    """changes: of each weight, by its name in the graph.  notes: what the user should be told."""

    name: str
    adapter: Adapter
    changes: Mapping[str, LowRank]
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """Of all that it says."""
        return self.name.encode() + self.adapter.digest

    @property
    def record(self) -> dict[str, Any]:
        """Its line of the manifest."""
        rank = max(change.a.dims[0] for change in self.changes.values())
        facts = {"name": self.name, "adapter": self.adapter.name, "sha256": self.adapter.sha256}
        return facts | {"rank": rank, "n_weights": len(self.changes)}


def parse_adapters(given: Sequence[str | Path]) -> tuple[list[str], dict[str, str]]:
    """Adapters that are to be merged, and by name those that stay beside the weights: "NAME=FOLDER", unless there is a
    folder of that name.  Refuses names that nobody could choose by."""
    merged, named = list[str](), dict[str, str]()
    for one in given:
        name, equals, folder = str(one).partition("=")
        if not equals or "/" in name or isinstance(one, Path) or os.path.isdir(one):
            merged.append(str(one))
            continue
        place = f"--adapter {shortened(str(one))}"
        if not NAME.fullmatch(name) or len(name) > MAX_ADAPTER_NAME:
            fact = f"an adapter's name has letters, digits, '.', '_' and '-', at most {MAX_ADAPTER_NAME}"
            raise LlmcError(fact, place=place, hint="as in sql=FOLDER")
        if name in named:
            raise LlmcError(f"two adapters are named {name!r}", place=place)
        named[name] = folder
    if len(named) > MAX_ADAPTERS:
        fact = f"an artifact holds at most {MAX_ADAPTERS} adapters by name, not {len(named)}"
        raise LlmcError(fact, place="--adapter")
    return merged, named


def find_named(
    name: str, adapter: Adapter, graph: ir.Model, checkpoint: Mapping[str, StoredTensor], *, is_part: bool
) -> NamedAdapter:
    """What an adapter changes in a model whose weights are unread.  Refuses what a token cannot choose."""

    def refuse(what: str) -> LlmcError:
        return LlmcError(f"the adapter cannot stay beside the weights: {what}", place=str(adapter.folder), hint=MERGE)

    merge = find_weights(graph, checkpoint, [adapter], is_part=is_part)
    if merge.of_tensors:
        raise refuse(f"it changes {short(next(iter(merge.of_tensors)))}, a piece of what the model has in one")
    shared = {each for value in unread(graph) if len(names(value)) > 1 for each in names(value)}
    changes: dict[str, LowRank] = {}
    for weight, found in merge.of_weights.items():
        change, *more = found
        if more or not isinstance(change, LowRank):
            raise refuse(f"it has {short(weight)} whole")
        if change.magnitude is not None:
            raise refuse(f"use_dora, of {short(weight)}, scales the weight itself")
        if change.of_embedding:
            raise refuse(f"it changes an embedding, {short(weight)}")
        if weight in shared:
            raise refuse(f"it changes {short(weight)}, which several modules share")
        changes[weight] = change
    return NamedAdapter(name, adapter, changes, merge.notes)


def added_by(adapters: Sequence[NamedAdapter]) -> Added:
    """What they add to each weight that one of them changes."""
    changed = dict.fromkeys(weight for named in adapters for weight in named.changes)
    return {
        weight: [factors(named, change) if (change := named.changes.get(weight)) else None for named in adapters]
        for weight in changed
    }


def factors(named: NamedAdapter, change: LowRank) -> Factors:
    """Both matrices, with the scale in the second."""
    a, b = change.a, change.b

    def scaled() -> Array:
        return np.asarray(b.read().astype(np.float32) * np.float32(change.scale))

    return Factors(
        Weight(f"{named.name}:{a.name}", a.dims, lambda: a.read().astype(np.float32)),
        Weight(f"{named.name}:{b.name}", b.dims, scaled),
    )


def with_adapter(source: SourceModel, named: NamedAdapter) -> SourceModel:
    """The model with one of its adapters merged into its weights: what a sequence of this adapter is compared with."""
    changes: Mapping[str, Sequence[Change]] = {name: [change] for name, change in named.changes.items()}
    changed = {name: merged_weight(source.weights[name], each) for name, each in changes.items()}
    weights = {**source.weights, **changed}
    return replace(source, weights=weights, adapters=(*source.adapters, named.adapter), named=())

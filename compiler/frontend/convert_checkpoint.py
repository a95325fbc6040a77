"""A checkpoint's tensors under the names, and in the shapes, that transformers' modules have them.

transformers renames and rearranges what older checkpoints hold when it loads them: GPT-NeoX's `embed_out` is its
`lm_head`, Mixtral's `experts.0.w1`, `experts.1.w1`, … are one tensor of all experts.  Its own table of such changes
(`transformers.conversion_mapping`) is read here, and its own operations carry them out, when a tensor is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np

from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.weights import Array, Coded, StoredDType, Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor that is worked out from several of a checkpoint's, or is a part of one.

    name: the model's.  group: the name under which transformers collects the sources: that of the first result.
    sources: (the pattern that matched, the tensor), in the order in which they are put together.
    """

    name: str
    group: str
    sources: tuple[tuple[str, StoredTensor], ...]
    converter: Any
    config: PretrainedConfig

    @property
    def file(self) -> Path:
        return self.sources[0][1].file

    @property
    def stored_dtype(self) -> StoredDType:
        dtypes = {tensor.stored_dtype for _, tensor in self.sources}
        return dtypes.pop() if len(dtypes) == 1 else "f32"

    @cached_property
    def dims(self) -> tuple[int, ...]:
        import torch

        return tuple(self._convert([torch.empty(tensor.dims, device="meta") for _, tensor in self.sources]).shape)

    def read(self) -> Array:
        """The tensor's values; reads all of its sources now."""
        arrays = [tensor.read() for _, tensor in self.sources]
        if len({array.dtype for array in arrays}) > 1:  # checkpoints of several dtypes, an adapter's sums
            arrays = [array.astype(np.float32, copy=False) for array in arrays]
        return from_torch(self._convert([to_torch(array) for array in arrays]))

    @property
    def coded(self) -> Coded | None:
        """How its values are kept, where all of its sources keep theirs so, and have the same columns."""
        kept = {tensor.coded for _, tensor in self.sources}
        columns = {tensor.dims[-1] for _, tensor in self.sources} | {self.dims[-1]}
        return kept.pop() if len(kept) == len(columns) == 1 else None

    def weight(self, name: str) -> Weight:
        return Weight(name, self.dims, self.read, self.stored_dtype, self.coded)

    def _convert(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        converter = deepcopy(self.converter)
        for (pattern, source), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.group, source.name, pattern, tensor)
        try:
            results = converter.convert(self.group, config=self.config)
            result = results[self.name]
        except Exception as error:  # tensors that do not fit together, or of which some are missing
            said = " ".join(str(error).split())[:200]
            raise LlmcError(
                f"the checkpoint's tensors do not make {self.name!r}: {said}",
                place=str(self.file),
                hint="config.json and the weights are not of the same model",
            ) from error
        value: torch.Tensor = result[0] if isinstance(result, list) else result
        return value


Tensor: TypeAlias = StoredTensor | ConvertedTensor


def convert_checkpoint(
    checkpoint: Mapping[str, StoredTensor], wanted: Collection[str], changes: Sequence[Any], config: PretrainedConfig
) -> dict[str, Tensor]:
    """The checkpoint as transformers would load it, nothing of it read yet.

    wanted: the names that a model knows, each as checkpoints may spell it: a tensor which has one already keeps it,
    unless its new name is one too.  changes: transformers' own, in order.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    tensors: dict[str, Tensor] = {}
    groups: dict[str, list[tuple[str, StoredTensor]]] = {}
    for key in sorted(checkpoint, key=dot_natural_key):  # experts in the order of their numbers
        name, pattern = rename_source_key(key, renamings, converters)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        if pattern is None:
            tensors[name] = checkpoint[key]
        else:
            groups.setdefault(name, []).append((pattern, checkpoint[key]))
    for group, sources in groups.items():
        converter = of_pattern[sources[0][0]]
        first, *others = converter.target_patterns
        for target in (first, *others):
            name = group.replace(first, target, 1)
            tensors[name] = ConvertedTensor(name, group, tuple(sources), converter, config)
    return tensors


def changes_of(architecture: str, config: PretrainedConfig) -> list[Any]:
    """transformers' changes for a class of models, in order, and those for all old checkpoints."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found: list[Any] | None = get_checkpoint_conversion_mapping(architecture)
    own = found or get_checkpoint_conversion_mapping(config.model_type) or []
    return [*own, *(get_checkpoint_conversion_mapping("legacy") or [])]


def changes_of_whole(config: PretrainedConfig) -> list[Any]:
    """Those for a model that takes pictures, and for each of its parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    from llmc.compiler.frontend.export.tower import build_whole
    from llmc.compiler.frontend.quiet import quiet

    with quiet():
        changes: list[Any] = get_model_conversion_mapping(build_whole(config))
    return changes


def to_torch(array: Array) -> torch.Tensor:
    """The same numbers in PyTorch, which knows no numpy array of bfloat16."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: torch.Tensor) -> Array:
    import torch

    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: Array = tensor.numpy()
    return array

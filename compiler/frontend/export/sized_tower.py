"""The same part of a model that takes pictures of any size: traced for so many patches, and turned into ONNX.

Such a tower takes all patches of a picture one behind the other, `pixels` float32 [N, patch], and is told how they lie.
What it asks of that is answered by inputs (asked_of_grid.py): `place` i64 [N, 2], row and column of each patch, and
where it has a table of positions `taps` i64 and `shares` f32 [N, n].  It gives `made` f32 [N / merge², d].  Patches are
in the order of their windows, if it has some, and attention is one node whether it is within windows or not: which ones
are is said in the metadata.

N, and the rows that are made of N patches, are numbers that nothing else has: a pass makes symbols of them
(passes/name_patches.py).  That a picture's height and width count nowhere else is seen by tracing another one of as
many patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from inspect import signature
from io import StringIO
from math import prod
from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface, PreTrainedModel

from llmc.compiler.frontend.export.asked_of_grid import WINDOWS, AskedOfGrid
from llmc.compiler.frontend.export.deep_rows import FEATURES as DEEP_FEATURES
from llmc.compiler.frontend.export.grids_in_text import GRIDS
from llmc.compiler.frontend.export.known_tensors import KnownTensors
from llmc.compiler.frontend.export.trace import to_onnx
from llmc.compiler.ops import OPSET
from llmc.runtime.errors import LlmcError
from llmc.runtime.format import Sized

FEATURES, PIXELS = "get_image_features", "pixel_values"
"""transformers' names for the method, and for what it takes."""
INTERFACE = "llmc_flash_attention"
"""The name under which transformers finds our attention: "flash" is in those of which segments are told."""
LINES, COLUMNS = 4 * 29, 4 * 37
"""Of patches in the picture that is traced."""
N_PATCHES = LINES * COLUMNS
WITHIN = "llmc.within_windows"
"""In the metadata of an attention node."""


def attention_in_segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    is_causal: bool = True,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, N, D], key and value [1, KH, N, D] -> [1, N, H, D], as one node over all patches."""
    known = ("dropout", "cu_seq_lens_k", "max_length_q", "max_length_k")
    more = [name for name, given in others.items() if name not in known and given is not None]
    if cu_seq_lens_q is None or is_causal or attention_mask is not None or more:
        raise LlmcError("its tower's patches do not see all others of segments that are told")
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    result = torch.onnx.ops.symbolic(
        "Attention",
        [query, key, value],
        {"scale": scale, "softcap": 0.0, "is_causal": 0},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=OPSET,
        metadata_props={"llmc.layer": "", "llmc.window": "0", WITHIN: str(int(len(cu_seq_lens_q) == WINDOWS))},
    )
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(INTERFACE, attention_in_segments)


def takes_any_size(whole: PreTrainedModel) -> bool:
    """Whether the model's method is told how the patches of a picture lie."""
    method = method_of(whole)
    return method is not None and GRIDS in signature(method).parameters


def method_of(whole: PreTrainedModel) -> Callable[..., Any] | None:
    """What makes rows of pixels; None: transformers has nothing of the name for it."""
    owner = next((module for module in whole.modules() if hasattr(module, FEATURES)), None)
    found: Callable[..., Any] | None = getattr(owner, FEATURES, None)
    return found


class Patches(torch.nn.Module):
    """pixels [N, patch], and what is asked of the places of patches, -> rows [n, d].  lines, columns: of patches."""

    def __init__(self, whole: PreTrainedModel, lines: int, columns: int) -> None:
        super().__init__()
        self.whole, self.grid = whole, (lines, columns)
        self.fake_mode = next(whole.parameters()).fake_mode
        self.asked = AskedOfGrid(whole, lines * columns, self.fake_mode)
        self.patch = numbers_of_patch(whole)

    def forward(self, pixels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        self.asked.inputs = inputs
        return rows_of_picture(self.whole, pixels, self.grid)

    def example(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], Sized]:
        """Inputs without values, and what the tower is made for."""
        with self.fake_mode:
            pixels = torch.empty(N_PATCHES, self.patch)
        inputs: dict[str, torch.Tensor] = {}
        with self.fake_mode, torch.no_grad(), KnownTensors(tuple(pixels.shape)), self.asked, told_segments(self.whole):
            made = self(pixels, **inputs)
        return pixels, self.asked.inputs, self.asked.sized(made.shape[0], self.patch)

    def program(self, pixels: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.export.ExportedProgram:
        known = KnownTensors(tuple(pixels.shape))
        with torch.no_grad(), known, self.asked, told_segments(self.whole), redirect_stderr(StringIO()):
            return torch.export.export(self, (pixels,), inputs, strict=False)


def rows_of_picture(whole: PreTrainedModel, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The rows [n, d] of a picture's patches; where they go into later layers too, what they add to each is behind
    them: [n, (1 + layers) d].  grid: lines and columns of the patches."""
    method = method_of(whole)
    assert method is not None
    made = method(**{PIXELS: pixels, GRIDS: torch.tensor([[1, *grid]])}, return_dict=True)
    parts = [of_one(part) for part in (made.pooler_output, *(getattr(made, DEEP_FEATURES, None) or ()))]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def of_one(made: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[n, d] of what is made of the only picture."""
    one: torch.Tensor = made if isinstance(made, torch.Tensor) else next(iter(made))
    return one.reshape(-1, one.shape[-1])


def numbers_of_patch(whole: PreTrainedModel) -> int:
    """What the first convolution takes at each place."""
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    first = next((module for module in whole.modules() if isinstance(module, kinds)), None)
    if first is None:
        raise LlmcError("its tower has no convolution that takes patches")
    return prod(first.weight.shape[1:])


@contextmanager
def told_segments(whole: PreTrainedModel) -> Iterator[None]:
    """Meanwhile attention is told where segments end, and which they are."""
    configs = {id(config): config for module in whole.modules() if (config := getattr(module, "config", None))}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = INTERFACE
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def trace_sized(whole: PreTrainedModel) -> tuple[ir.Model, Sized]:
    """The rows of a picture as ONNX, and what its tower is made for."""
    patches, turned = Patches(whole, LINES, COLUMNS), Patches(whole, COLUMNS, LINES)
    pixels, inputs, sized = patches.example()
    program, other = (each.program(pixels, inputs) for each in (patches, turned))
    if said_of(program) != said_of(other):
        raise LlmcError("its tower asks for a picture's height and width itself")
    return to_onnx(program, "made"), sized


def said_of(program: torch.export.ExportedProgram) -> tuple[str, list[Any]]:
    """What is computed, and the tensors that have been worked out meanwhile."""
    return str(program.graph_module.code), [constant.tolist() for constant in program.constants.values()]

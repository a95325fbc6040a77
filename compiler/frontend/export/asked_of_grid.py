"""What a tower that takes pictures of any size asks of a picture's grid, and answers for a trace.

transformers' towers of this kind work out what depends on a picture's height and width by functions of one module of
it, `vision_utils`, that a caller may do ahead.  Here each is answered by an input of the trace, or by what is known of
one picture whose patches are in order; what was asked, and with which settings, is what the runtime has to make of each
picture (runtime/src/grid.c).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, vision_utils

from llmc.runtime.errors import LlmcError
from llmc.runtime.format import Sized

PLACE, TAPS, SHARES = "place", "taps", "shares"
"""Inputs of a trace: i64 [N, 2], row and column of each patch; i64 and f32 [N, n], entries of a table of positions and
what each of them counts."""
N_TAPS = {"bilinear": 4, "bicubic": 16}
WINDOWS = 3
"""How many bounds a trace has of segments that attend each other, where these are windows: of all patches it is 2."""


class AskedOfGrid:
    """Within it, a model's modules get answers for a picture of so many patches.  A context manager.

    inputs: what answers are made of, by name; those that are missing are made, without values.  asked: the settings of
    each function, by its name.
    """

    def __init__(self, whole: PreTrainedModel, n_patches: int, fake_mode: FakeTensorMode) -> None:
        self.n_patches, self.fake_mode = n_patches, fake_mode
        self.inputs: dict[str, torch.Tensor] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        namespaces = {type(module).__module__ for module in whole.modules()}
        self.places = [
            (vars(sys.modules[name]), known, function)
            for name in sorted(namespaces)
            for known, function in vars(sys.modules[name]).items()
            if getattr(function, "__module__", None) == vision_utils.__name__
        ]

    def __enter__(self) -> AskedOfGrid:
        for namespace, name, function in self.places:
            namespace[name] = self.answering(function)
        return self

    def __exit__(self, *_: object) -> None:
        for namespace, name, function in self.places:
            namespace[name] = function

    def answering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for one of transformers' functions."""
        answers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "get_vision_position_ids": self.places_of_patches,
            "get_vision_cu_seqlens": lambda _: self.bounds(),
            "get_vision_attention_seqlens": lambda _: (self.bounds(), self.n_patches),
            "get_vision_window_index": self.windows,
            "get_vision_interpolation_indices_and_weights": self.table_of_positions,
        }

        def answer(*arguments: Any, **options: Any) -> Any:
            given = signature(function).bind(*arguments, **options)
            given.apply_defaults()
            left_out = ("grid_thw", "kwargs", "config")
            settings = {name: value for name, value in given.arguments.items() if name not in left_out}
            name = function.__name__
            if name not in answers:
                raise LlmcError(f"its tower asks {name} of a picture's grid")
            if self.asked.setdefault(name, settings) != settings:
                raise LlmcError(f"its tower asks {name} twice, of different sizes")
            return answers[name](settings)

        return answer

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name not in self.inputs:
            with self.fake_mode:
                self.inputs[name] = torch.zeros(shape, dtype=dtype)
        return self.inputs[name]

    def places_of_patches(self, settings: dict[str, Any]) -> torch.Tensor:
        if settings["include_temporal"]:
            raise LlmcError("its tower's patches have positions in three directions")
        return self.input(PLACE, (self.n_patches, 2), torch.long)

    def bounds(self) -> torch.Tensor:
        return torch.tensor([0, self.n_patches], dtype=torch.int32)

    def windows(self, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches come in the order of their windows already."""
        n_rows = self.n_patches // settings["spatial_merge_size"] ** 2
        bounds = torch.tensor([0, self.n_patches // 2, self.n_patches], dtype=torch.int32)
        return torch.arange(n_rows), bounds

    def table_of_positions(self, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.n_patches, N_TAPS[settings["mode"]]
        return self.input(TAPS, shape, torch.long), self.input(SHARES, shape, torch.float32)

    def sized(self, n_rows: int, patch: int) -> Sized:
        """What the runtime has to know.  n_rows: that the tower makes of the patches.  patch: numbers of one.  Raises
        LlmcError for settings that do not fit each other."""
        merge = round((self.n_patches / n_rows) ** 0.5)
        places, windows, table = (
            self.asked.get(f"get_vision_{name}", {})
            for name in ("position_ids", "window_index", "interpolation_indices_and_weights")
        )
        merges = {merge, *(said["spatial_merge_size"] for said in (places, windows, table) if said)}
        if n_rows * merge**2 != self.n_patches or len(merges) > 1 or not places:
            raise LlmcError(
                "its tower makes rows of a picture that are not squares of its patches, one behind the other"
            )
        window = windows["window_size"] // merge // windows["patch_size"] if windows else 0
        sized = Sized(patch, merge, window)
        if not table:
            return sized
        if table["padding"] != "border":
            raise LlmcError("its tower's table of positions ends in zeros")
        side, aligned = table["num_grid_per_side"], int(table["align_corners"])
        return sized._replace(side=side, n_taps=N_TAPS[table["mode"]], taps_aligned=aligned)

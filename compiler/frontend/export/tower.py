"""The part of a model that makes rows of embeddings of a picture: traced for one tile, and turned into ONNX.

transformers' classes of such models have a method for it, `get_image_features`: tower, choice of a layer, projector
and all.  So nothing has to be known of what a family is made of.  The graph has the input `pixels`, float32
[3, H, W], and the result `made`, float32 [n, d]: what stands in the text's embeddings in place of n tokens.

Every shape is known: one tile, of one size.  As in other graphs each attention is one `Attention` node, and weights
have the names of the whole model's.  The metadata says `llmc.architecture` and `llmc.prefix` (exporter.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from inspect import Parameter, signature
from io import StringIO
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.frontend.export.attention import INTERFACE
from llmc.compiler.frontend.export.exporter import first_line, simplify, was_interrupted
from llmc.compiler.frontend.export.grids_in_text import check_grids
from llmc.compiler.frontend.export.known_tensors import KnownTensors
from llmc.compiler.frontend.export.names import drop_remarks, forget_weights, number_layers
from llmc.compiler.frontend.export.rows_in_text import check_rows
from llmc.compiler.frontend.export.sized_tower import FEATURES, PIXELS, WITHIN, method_of, takes_any_size, trace_sized
from llmc.compiler.frontend.export.trace import to_onnx, without_values
from llmc.compiler.frontend.quiet import quiet
from llmc.compiler.graph import attribute
from llmc.compiler.ops import DEEP, IN_WINDOWS, SEES_AHEAD, SIZED, TURNED
from llmc.runtime.errors import LlmcError

BESIDE = "its tower takes {} beside pixels, for pictures of many sizes"
INSIDE = "whole."
"""How names of weights begin in a trace of the method."""


def refused(model: Any, why: str) -> LlmcError:
    """The error that says why no pictures are compiled for a model."""
    return LlmcError(
        f"the architecture {type(model).__name__} is not supported with --images: {why}",
        hint="without --images its text part is compiled alone",
    )


def export_tower(config: PretrainedConfig, tile: tuple[int, int, int], image_token: int) -> ir.Model:
    """The float32 graph of a tile [3, H, W].  image_token: what stands in a prompt for each row.

    Refuses a model whose text part needs to be told more of a picture than the rows, or whose tower more than pixels.
    """

    def of_tile(model: PreTrainedModel) -> ir.Model:
        rows = FeaturesOfTile(model, tile)
        sees_ahead = check_rows(model, rows.example(), image_token)
        graph_model = trace(rows)
        finish(graph_model, model)
        if sees_ahead:
            graph_model.metadata_props[SEES_AHEAD] = "1"
        return graph_model

    return exported(config, of_tile)


def export_sized_tower(config: PretrainedConfig, image_token: int) -> ir.Model:
    """The float32 graph of a picture of any size: sized_tower.py.  The same is refused, and what else depends on how
    high and wide a picture is."""

    def of_picture(model: PreTrainedModel) -> ir.Model:
        if not takes_any_size(model):
            raise LlmcError("its tower is not told how the patches of a picture lie")
        graph_model, sized = trace_sized(model)
        taken = check_grids(model, image_token, sized.merge)
        finish(graph_model, model)
        attentions = [node for node in graph_model.graph if node.op_type == "Attention"]
        within = [str(number) for number, node in enumerate(attentions) if node.metadata_props.pop(WITHIN) == "1"]
        graph_model.metadata_props[SIZED] = " ".join(map(str, sized))
        graph_model.metadata_props[IN_WINDOWS] = " ".join(within)
        said = {TURNED: taken.is_turned, DEEP: taken.is_deep}
        graph_model.metadata_props.update({name: "1" for name, holds in said.items() if holds})
        return graph_model

    return exported(config, of_picture)


def exported(config: PretrainedConfig, export: Callable[[PreTrainedModel], ir.Model]) -> ir.Model:
    """The graph that is made of the whole model; whatever goes wrong is said of it."""
    with quiet():
        model = build_whole(config)
        try:
            graph_model = export(model)
        except LlmcError as error:
            raise refused(model, error.fact) from error
        except Exception as error:  # torch and transformers raise anything at all
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            raise refused(model, f"exporting its tower failed: {first_line(error)}") from error
    graph_model.metadata_props["llmc.architecture"] = type(model).__name__
    graph_model.metadata_props["llmc.prefix"] = model.base_model_prefix
    return graph_model


def build_whole(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model, whose parameters have a shape and no memory."""
    try:
        with empty_weights():
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                config, attn_implementation=INTERFACE, dtype=torch.float32
            ).eval()
    except Exception as error:  # transformers raises anything at all
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise LlmcError(f"the configuration describes no model: {first_line(error)}") from error
    model.tie_weights()
    without_values(model)
    return model


class FeaturesOfTile(torch.nn.Module):
    """pixels [3, H, W] -> rows [n, d].  Some models count tiles on one axis, others on two."""

    def __init__(self, whole: PreTrainedModel, tile: tuple[int, int, int]) -> None:
        super().__init__()
        self.whole, self.tile, self.n_axes = whole, tile, 0
        method = method_of(whole)
        known = signature(method).parameters if method is not None else {}
        if method is None or PIXELS not in known:
            raise LlmcError(f"transformers has no {FEATURES} for it that takes pixels")
        self.method = method
        more = [parameter for name, parameter in known.items() if name != PIXELS]
        self.optional = [each.name for each in more if "Tensor" in str(each.annotation)]
        needed = [
            each.name for each in more if each.default is Parameter.empty and each.kind is not Parameter.VAR_KEYWORD
        ]
        if needed:
            raise LlmcError(BESIDE.format(needed[0]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return rows_of(self.features(pixels))

    def features(self, pixels: torch.Tensor) -> Any:
        """What the method makes of the tile: a tensor, or one for each picture."""
        tiles = pixels.reshape(*[1] * self.n_axes, *pixels.shape)
        return self.method(**{PIXELS: tiles}, return_dict=True).pooler_output

    def real(self, pixels: torch.Tensor) -> torch.Tensor:
        """The rows of a model that has its weights."""
        return rows_of(self._count_axes(pixels))

    def example(self) -> Any:
        """What the method gives, without values; finds out how many axes count tiles.  Raises LlmcError where pixels
        alone are not enough."""
        with next(self.whole.parameters()).fake_mode, torch.no_grad(), KnownTensors(self.tile):
            return self._count_axes(torch.empty(self.tile))

    def _count_axes(self, pixels: torch.Tensor) -> Any:
        said: Exception | None = None
        for self.n_axes in (1, 2):
            try:
                return self.features(pixels)
            except Exception as error:  # the number of axes is one of many things to fail
                said = error if said is None or "unpack" in str(said) else said
        assert said is not None
        if self.optional and isinstance(said, AttributeError):  # it has asked None for something
            raise LlmcError(BESIDE.format(self.optional[0])) from said
        raise said


def rows_of(made: Any) -> torch.Tensor:
    """[n, d] of what the method gives: a tensor, or one for each picture."""
    rows: torch.Tensor = made if isinstance(made, torch.Tensor) else torch.cat(tuple(made))
    return rows.reshape(-1, rows.shape[-1])


def trace(rows: FeaturesOfTile) -> ir.Model:
    """The rows of a tile as ONNX."""
    with next(rows.whole.parameters()).fake_mode:
        pixels = torch.empty(rows.tile)
    with torch.no_grad(), KnownTensors(rows.tile), redirect_stderr(StringIO()):
        program = torch.export.export(rows, (pixels,), strict=False)
    return to_onnx(program, "made")


def finish(graph_model: ir.Model, model: PreTrainedModel) -> None:
    """Names of the whole model's for weights, and no masks.  In place."""
    graph = graph_model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith(INSIDE):
            del graph.initializers[name]
            value.name = name.removeprefix(INSIDE)
            graph.initializers[value.name] = value
    forget_weights(graph_model, model)
    simplify(graph_model)
    number_layers(graph)
    drop_full_masks(graph)
    ir_passes.RemoveUnusedNodesPass()(graph_model)
    drop_remarks(graph_model)


def drop_full_masks(graph: ir.Graph) -> None:
    """Drop masks under which every patch sees every other one.  Raises LlmcError for any other, and for none where
    attention is causal."""
    for node in (node for node in graph if node.op_type == "Attention"):
        if attribute(node, "is_causal", 0) or node.metadata_props.get("llmc.window", "0") != "0":
            raise LlmcError("its tower's patches do not see all others")
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None:
            continue
        if mask.const_value is None:
            raise LlmcError("its tower's mask depends on the picture")
        counts = mask.const_value.numpy()
        if not (counts if counts.dtype == np.bool_ else counts == 0).all():
            raise LlmcError("its tower's patches do not see all others")
        node.resize_inputs(3)

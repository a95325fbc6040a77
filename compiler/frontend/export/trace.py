"""A model of transformers, built without memory for its parameters, traced by `torch.export` and turned into ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from inspect import signature
from io import StringIO
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from llmc.compiler.frontend.classes import build, is_classifier, is_encoder
from llmc.compiler.frontend.config import kinds_of, max_tokens
from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.frontend.export.attention import INTERFACE
from llmc.compiler.frontend.export.complex_pairs import ComplexPairs
from llmc.compiler.frontend.export.deep_rows import marked_layers
from llmc.compiler.frontend.export.experts import name_gates, require_interface
from llmc.compiler.frontend.export.first_position import first_position, shift_positions
from llmc.compiler.frontend.export.rotary import stretch_nothing
from llmc.compiler.frontend.export.states import as_nodes
from llmc.compiler.frontend.export.token_types import n_token_types, separate_types
from llmc.compiler.frontend.export.translations import TRANSLATIONS
from llmc.compiler.frontend.export.unsupported import has_own_attention
from llmc.compiler.ops import DOMAIN, EMBEDDED, N_TURNS, OPSET, VERSION

POSITIONS, TURNS = "position_ids", "turns"
EXAMPLE_SHAPE = (2, 16)  # torch.export takes a dimension of 1 for a constant


def build_without_memory(config: PretrainedConfig) -> PreTrainedModel:
    """The model with parameters that have a shape and no storage; its buffers are real."""
    with empty_weights():
        model = build(
            config,
            attn_implementation="eager" if has_own_attention(config) else INTERFACE,
            experts_implementation="llmc",
            dtype=torch.float32,
        ).eval()
    model.tie_weights()
    kinds = kinds_of(config)
    if "moe" in kinds or "mlp" not in kinds:
        require_interface(config, model)
    name_gates(model)
    stretch_nothing(model)
    without_values(model)
    return model


def without_values(model: PreTrainedModel) -> None:
    """Make parameters on "meta" fake tensors.  There they would clash with the buffers' device; as fakes they are on
    the CPU like everything else.  In place."""
    fakes: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
                    module._parameters[name] = fakes.setdefault(id(parameter), fake)


def trace(model: PreTrainedModel, *, takes_rows: bool = False, is_turned: bool = False, n_deep: int = 0) -> ir.Model:
    """The model as ONNX: `input_ids`, `position_ids` int64 [batch, sequence] -> `logits`.  takes_rows: mark where it
    has its tokens' embeddings; and n_deep: where it has the results of so many of its first layers.  is_turned:
    positions have three directions, and are also an input `turns` int64 [batch, sequence, 3]."""
    n_types = n_token_types(model) if is_classifier(model.config) else 1
    if is_classifier(model.config):
        model.config.pad_token_id = -1  # no text is filled up: its last token is the last one, whichever that is
    model.config.use_cache = False
    arguments, shapes = example_inputs(model, n_types)
    if is_turned:
        with next(model.parameters()).fake_mode:
            arguments[POSITIONS] = torch.zeros((N_TURNS, *EXAMPLE_SHAPE), dtype=torch.long)
        shapes[POSITIONS] = {1 + axis: dim for axis, dim in shapes[POSITIONS].items()}
    # What export prints is the graph in which it got stuck.
    marked = marked_embeddings(model) if takes_rows else nullcontext()
    deep = marked_layers(model, n_deep) if n_deep else nullcontext()
    with torch.no_grad(), ComplexPairs(), as_nodes(model), marked, deep, redirect_stderr(StringIO()):
        program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)
    exported = to_onnx(program, "logits")
    if is_encoder(model.config) and (first := first_position(model)):
        shift_positions(exported, first)
    if n_types > 1:
        separate_types(exported, model.get_input_embeddings().num_embeddings, n_types)
    if is_turned:
        name_turns(exported.graph)
    if is_turned or POSITIONS not in arguments:  # an input that nothing takes
        inputs = exported.graph.inputs
        behind = 1 if is_turned else len(inputs)
        inputs.insert(behind, ir.Value(name=POSITIONS, shape=inputs[0].shape, type=inputs[0].type))
    return exported


def name_turns(graph: ir.Graph) -> None:
    """The input of positions [3, batch, sequence] becomes `turns` [batch, sequence, 3].  In place."""
    at = next(i for i, value in enumerate(graph.inputs) if value.name == POSITIONS)
    before = graph.inputs[at]
    assert before.shape is not None
    turns = ir.Value(name=TURNS, shape=ir.Shape([*before.shape[1:], N_TURNS]), type=before.type)
    moved = ir.node("Transpose", [turns], {"perm": [2, 0, 1]})
    moved.outputs[0].shape, moved.outputs[0].type = before.shape, before.type
    graph.insert_before(graph[0], moved)
    before.replace_all_uses_with(moved.outputs[0])
    graph.inputs[at] = turns


def to_onnx(program: torch.export.ExportedProgram, result: str) -> ir.Model:
    """What torch.export has traced as ONNX; result: the name of what it gives."""
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        output_names=[result],
        custom_translation_table=TRANSLATIONS,
    )
    assert exported is not None
    return exported.model


@contextmanager
def marked_embeddings(model: PreTrainedModel) -> Iterator[None]:
    """While it is traced, what transformers calls the model's input embeddings gives its result as an `llmc.Embedded`:
    that is what `inputs_embeds` replaces."""

    def mark(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{EMBEDDED}", (embedded,), dtype=embedded.dtype, shape=embedded.shape, version=VERSION
        )
        return result

    hook = model.get_input_embeddings().register_forward_hook(mark)
    try:
        yield
    finally:
        hook.remove()


def example_inputs(model: PreTrainedModel, n_types: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is called with while it is traced, by name, and which dimensions of that are dynamic."""
    known = signature(model.forward).parameters
    names = [name for name in ("input_ids", POSITIONS) if name in known]
    names += ["token_type_ids"] if n_types > 1 else []
    with next(model.parameters()).fake_mode:
        arguments: dict[str, Any] = {name: torch.zeros(EXAMPLE_SHAPE, dtype=torch.long) for name in names}
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=longest(model.config))}
    shapes: dict[str, Any] = dict.fromkeys(arguments, dims)
    if "use_cache" in known:
        arguments["use_cache"], shapes["use_cache"] = False, None
    return arguments, shapes


def longest(config: PretrainedConfig) -> int | None:
    """The longest sequence that a graph is traced for; None: any.  A model that makes masks ahead cuts them to length,
    and the whole mask would be a case of its own."""
    limit = max_tokens(config)
    return limit - 1 if has_own_attention(config) and limit > EXAMPLE_SHAPE[1] else None

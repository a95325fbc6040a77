"""From a transformers configuration to the graph of the whole sequence, without weights.

The model is built without memory for its parameters, traced by `torch.export` and turned into ONNX, opset 23, float32:
inputs `input_ids` and `position_ids`, int64 [batch, sequence]; output `logits`, float32 [batch, sequence, vocabulary].
Initializers keep the checkpoint's names; those the checkpoint holds have no value yet (`const_value` is None).

The model's metadata says `llmc.architecture`, `llmc.n_context` (0: no limit of its own) and `llmc.prefix` (the name of
the decoder within the whole model, which some checkpoints leave out); a value's `llmc.tied` says the other names of a
weight that several modules share.

Every attention is one `Attention` node: transformers calls our function for it (attention.py), whatever the
architecture; one with sinks is `llmc.SinkAttention`.  Opset 23 has no attribute for a sliding window, so the node
carries in `metadata_props`

    llmc.layer     index of the layer
    llmc.window    keys a token sees, itself included; 0: all before it; -n: those of its own chunk of n tokens

A model whose code asks for no such function spells its attention out; so does the graph then, masks and all, and the
model's metadata says `llmc.spelled_out`.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions
from transformers import PretrainedConfig, PreTrainedModel

from llmc.compiler.frontend.classes import is_classifier, is_encoder
from llmc.compiler.frontend.config import LIMIT, check_layers, kinds_of, max_tokens
from llmc.compiler.frontend.embedding import BOTH_WAYS, HEADLESS
from llmc.compiler.frontend.export.attention import CHUNKED, INTERFACE
from llmc.compiler.frontend.export.experts import check_experts
from llmc.compiler.frontend.export.first_position import FIRST_POSITION
from llmc.compiler.frontend.export.masks import drop_masks
from llmc.compiler.frontend.export.names import (
    drop_remarks,
    forget_weights,
    name_constants,
    number_layers,
    rename_dims,
)
from llmc.compiler.frontend.export.repeat_layers import LayersDifferError, repeat_layers, shorten
from llmc.compiler.frontend.export.states import KINDS as STATES
from llmc.compiler.frontend.export.states import count_without_attention
from llmc.compiler.frontend.export.trace import build_without_memory, trace
from llmc.compiler.frontend.export.unsupported import OWN_ATTENTION, has_own_attention, unsupported
from llmc.compiler.frontend.quiet import quiet
from llmc.compiler.frontend.source import SPELLED_OUT
from llmc.compiler.ops import EMBEDDED
from llmc.runtime.errors import LlmcError, shortened

ATTENTIONS = ("full_attention", "sliding_attention", CHUNKED, "attention")
"""The kinds of layers that are compiled."""
MOST_ELEMENTS = 1 << 30
"""The most elements of constants that are compared with each other."""


def export_graph(
    config: PretrainedConfig, *, takes_rows: bool = False, is_turned: bool = False, n_deep: int = 0
) -> ir.Model:
    """The float32 graph of a causal language model, of an encoder, whose `logits` are its last hidden states, or of a
    classifier of texts, whose `logits` [batch, labels] are those of a text (classification.py).
    takes_rows: mark where rows may stand for tokens, by nodes `llmc.Embedded`; n_deep: and where they go into so many
    of the first layers, by nodes `llmc.Deepened` behind these.  is_turned: positions have three directions, by a third
    input, `turns` int64 [batch, sequence, 3].
    Refuses an architecture that it cannot express."""
    n_layers = n if isinstance(n := getattr(config, "num_hidden_layers", None), int) else 0
    n_context = max_tokens(config)
    check_layers(n_layers)
    if not isinstance(n_context, int) or n_context < 0:
        raise LlmcError(f"the configuration describes no model: {LIMIT} is {shortened(n_context)}")
    _refuse_other_layers(config)
    with quiet():
        model = _build(config)
        if n_layers < 1:
            raise LlmcError("the configuration describes no model: it has no layers")
        _refuse_empty_weights(model)
        graph_model = _export(config, model, Wanted(takes_rows, is_turned, n_deep))
    first = int(graph_model.metadata_props.get(FIRST_POSITION, "0"))
    graph_model.metadata_props["llmc.architecture"] = type(model).__name__
    graph_model.metadata_props["llmc.n_context"] = str(max(n_context - first, 0))
    graph_model.metadata_props["llmc.prefix"] = model.base_model_prefix
    if is_encoder(config) or is_classifier(config):
        graph_model.metadata_props[HEADLESS] = str(model.get_input_embeddings().num_embeddings)
    return graph_model


def _refuse_other_layers(config: PretrainedConfig) -> None:
    """Refuse layers of other kinds than attention before anything is built of them."""
    other = next((kind for kind in kinds_of(config) if kind not in (*ATTENTIONS, *STATES)), None)
    if other is not None:
        raise unsupported(config, f"its layers of kind {str(other)[:40]} are not compiled yet")


def _build(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its parameters; what is wrong with its configuration shows here."""
    try:
        return build_without_memory(config)
    except LlmcError:
        raise
    except Exception as error:  # transformers raises anything at all
        if has_own_attention(config) or (isinstance(error, KeyError) and error.args == (INTERFACE,)):
            raise unsupported(config, OWN_ATTENTION) from error
        raise LlmcError(f"the configuration describes no model: {first_line(error)}") from error


def _refuse_empty_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            shape = list(parameter.shape)
            raise LlmcError(f"the configuration describes no model: {name} has the shape {shape}")


class Wanted(NamedTuple):
    """What a graph is to have besides: see `export_graph`."""

    takes_rows: bool
    is_turned: bool
    n_deep: int


def _export(config: PretrainedConfig, model: PreTrainedModel, wanted: Wanted) -> ir.Model:
    try:
        return _export_repeated(config, model, wanted) or _export_whole(config, model, wanted)
    except LlmcError:
        raise
    except Exception as error:  # torch and transformers raise anything at all
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        raise unsupported(config, f"exporting it failed: {first_line(error)}") from error


def _export_whole(config: PretrainedConfig, model: PreTrainedModel, wanted: Wanted) -> ir.Model:
    graph_model = trace(model, **wanted._asdict())
    if wanted.takes_rows and all(node.op_type != EMBEDDED for node in graph_model.graph):
        raise unsupported(config, "it looks its tokens' embeddings up elsewhere than in its input embeddings")
    if is_encoder(config):
        del graph_model.graph.outputs[1:]
        ir_passes.RemoveUnusedNodesPass()(graph_model)
    if len(graph_model.graph.outputs) != 1:
        raise unsupported(config, "it gives more than logits")
    kinds = kinds_of(config)
    n_attention = sum(node.op_type in ("Attention", "SinkAttention") for node in graph_model.graph)
    if has_own_attention(config):
        graph_model.metadata_props[SPELLED_OUT] = "yes"
        graph_model.metadata_props.update({BOTH_WAYS: "yes"} if is_encoder(config) else {})
    elif n_attention != (n := config.num_hidden_layers - count_without_attention(config, kinds, graph_model.graph)):
        which = "fewer" if n_attention < n else "more"
        raise unsupported(config, f"it has {which} attentions than layers")
    check_experts(config, model, graph_model.graph)
    number_layers(graph_model.graph)
    forget_weights(graph_model, model)
    simplify(graph_model)
    try:
        drop_masks(graph_model.graph, max_tokens(config))
    except LlmcError as error:
        raise unsupported(config, error.fact) from error
    ir_passes.RemoveUnusedNodesPass()(graph_model)
    if has_own_attention(config):  # whose masks and angles are made ahead, in each layer the same
        ir_passes.DeduplicateHashedInitializersPass(size_limit=MOST_ELEMENTS)(graph_model)
        ir_passes.CommonSubexpressionEliminationPass()(graph_model)
        name_constants(graph_model.graph)
    rename_dims(graph_model)
    drop_remarks(graph_model)
    return graph_model


def _export_repeated(config: PretrainedConfig, model: PreTrainedModel, wanted: Wanted) -> ir.Model | None:
    """The graph from that of its first layers, if it is these repeated and has the whole model's weights."""
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    shorter = shorten(config) if not wanted.n_deep else None
    if shorter is None or len(stacks) != 1:
        return None
    short, how = shorter
    graph_model = _export_whole(short, build_without_memory(short), wanted)
    try:
        repeat_layers(graph_model, f"{stacks[0]}.", config.num_hidden_layers, how)
    except LayersDifferError:
        return None
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    unread = {value.name: value for value in graph_model.graph.initializers.values() if value.const_value is None}
    parameters = {name for name, _ in model.named_parameters()}
    same = parameters <= unread.keys() and all(list(unread[name].shape or ()) == shapes.get(name) for name in unread)
    return graph_model if same else None


def simplify(model: ir.Model) -> None:
    """Fold constants and form RMSNormalization and RotaryEmbedding; every value gets its shape.  In place."""
    optimize_ir(model)
    onnx_fusions.fuse(model)
    ir_passes.CommonSubexpressionEliminationPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    ir_passes.ShapeInferencePass()(model)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: PyTorch makes one of its own of it in C++, which names it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The line that says what was wrong: the first one of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("Constraints violated"):  # what torch.export found out about a length
        return "its code is for sequences of certain lengths alone"
    return f"{type(error).__name__}: {lines[0]}"[:300]

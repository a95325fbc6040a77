"""From a transformers configuration to the graph of the whole sequence, without weights.

The model is built without memory for its parameters, traced by `torch.export` and turned into ONNX, opset 23, float32:
inputs `input_ids` and `position_ids`, int64 [batch, sequence]; output `logits`, float32 [batch, sequence, vocabulary].
Initializers keep the checkpoint's names; those the checkpoint holds have no value yet (`const_value` is None).

The model's metadata says `llmc.architecture`, `llmc.n_context` (0: no limit of its own) and `llmc.prefix` (the name of
the decoder within the whole model, which some checkpoints leave out); a value's `llmc.tied` says the other names of a
weight that several modules share.

Every attention is one `Attention` node: transformers calls the function registered here for it, whatever the
architecture; one with sinks is `llmc.SinkAttention`.  Opset 23 has no attribute for a sliding window, so the node
carries in `metadata_props`

    llmc.layer     index of the layer
    llmc.window    keys a token sees, itself included; 0: all before it; -n: those of its own chunk of n tokens

A model whose code asks for no such function spells its attention out; so does the graph then, masks and all, and the
model's metadata says `llmc.spelled_out`.
"""

from __future__ import annotations

import re
from contextlib import redirect_stderr
from inspect import signature
from io import StringIO
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from onnxscript import opset23 as onnx_op
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from llmc.compiler.frontend.classes import build, is_classifier, is_encoder
from llmc.compiler.frontend.config import check_layers
from llmc.compiler.frontend.embedding import BOTH_WAYS, HEADLESS
from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.frontend.export.complex_pairs import ComplexPairs
from llmc.compiler.frontend.export.experts import check_experts, name_gates, require_interface
from llmc.compiler.frontend.export.first_position import FIRST_POSITION, first_position, shift_positions
from llmc.compiler.frontend.export.masks import drop_masks, exported_mask
from llmc.compiler.frontend.export.repeat_layers import LayersDifferError, repeat_layers, shorten
from llmc.compiler.frontend.export.rotary import stretch_nothing
from llmc.compiler.frontend.export.states import KINDS as STATES
from llmc.compiler.frontend.export.states import WITH_ATTENTION, as_nodes, count_without_attention
from llmc.compiler.frontend.export.token_types import n_token_types, separate_types
from llmc.compiler.frontend.export.unsupported import OWN_ATTENTION, has_own_attention
from llmc.compiler.frontend.export.unsupported import unsupported as _unsupported
from llmc.compiler.frontend.quiet import quiet
from llmc.compiler.frontend.source import SPELLED_OUT
from llmc.compiler.ops import DOMAIN, VERSION
from llmc.runtime.errors import LlmcError, shortened

OPSET = 23
EXAMPLE_SHAPE = (2, 16)  # torch.export takes a dimension of 1 for a constant
KINDS = ("layer_types", "layers_block_type")
"""What configurations call the list of their layers' kinds."""
CHUNKED = "chunked_attention"
ATTENTIONS = ("full_attention", "sliding_attention", CHUNKED, "attention")
"""The kinds of layers that are compiled."""
LIMIT = "max_position_embeddings"
LIMITS = (LIMIT, "max_seq_len", "seq_length")
"""What configurations call the most tokens of a sequence; the last two where positions are not embedded."""
UNKNOWN = ("indices", "block_indices", "position_bias", "sinks")
"""What some models pass to attention that changes its results: chosen keys, biases."""
INTERFACE = "llmc"
"""The name under which transformers finds our attention."""
MOST_ELEMENTS = 1 << 30
"""Of constants that are compared with each other."""


def export_graph(config: PretrainedConfig) -> ir.Model:
    """The float32 graph of a causal language model, of an encoder, whose `logits` are its last hidden states, or of a
    classifier of texts, whose `logits` [batch, labels] are those of a text (classification.py).
    Refuses an architecture that it cannot express."""
    n_layers = n if isinstance(n := getattr(config, "num_hidden_layers", None), int) else 0
    n_context = max_tokens(config)
    check_layers(n_layers)
    if not isinstance(n_context, int) or n_context < 0:
        raise LlmcError(f"the configuration describes no model: {LIMIT} is {shortened(n_context)}")
    _refuse_other_layers(config)
    with quiet():
        try:
            model = _build_without_memory(config)
        except LlmcError:
            raise
        except Exception as error:  # transformers raises anything at all
            if has_own_attention(config) or (isinstance(error, KeyError) and error.args == (INTERFACE,)):
                raise _unsupported(config, OWN_ATTENTION) from error
            raise LlmcError(f"the configuration describes no model: {_first_line(error)}") from error
        if n_layers < 1:
            raise LlmcError("the configuration describes no model: it has no layers")
        for name, parameter in model.named_parameters():
            if not parameter.numel():
                shape = list(parameter.shape)
                raise LlmcError(f"the configuration describes no model: {name} has the shape {shape}")
        try:
            graph_model = _export_repeated(config, model) or _export_whole(config, model)
        except LlmcError:
            raise
        except Exception as error:  # torch and transformers raise anything at all
            if _was_interrupted(error):
                raise KeyboardInterrupt from error
            raise _unsupported(config, f"exporting it failed: {_first_line(error)}") from error
    graph_model.metadata_props.update(
        {
            "llmc.architecture": type(model).__name__,
            "llmc.n_context": str(n_context),
            "llmc.prefix": model.base_model_prefix,
        }
    )
    if is_encoder(config) or is_classifier(config):
        graph_model.metadata_props[HEADLESS] = str(model.get_input_embeddings().num_embeddings)
    first = int(graph_model.metadata_props.get(FIRST_POSITION, "0"))
    graph_model.metadata_props["llmc.n_context"] = str(max(n_context - first, 0))
    return graph_model


def max_tokens(config: PretrainedConfig) -> int:
    """The most tokens of a sequence; 0 where the configuration does not say."""
    return next((limit for name in LIMITS if (limit := getattr(config, name, None))), 0)


def _refuse_other_layers(config: PretrainedConfig) -> None:
    """Refuse layers of other kinds than attention before anything is built of them."""
    other = next((kind for kind in kinds_of(config) if kind not in (*ATTENTIONS, *STATES)), None)
    if other is not None:
        raise _unsupported(config, f"its layers of kind {str(other)[:40]} are not compiled yet")


def kinds_of(config: PretrainedConfig) -> list[str]:
    """What the configuration says of each layer's kind; nothing, where it says nothing."""
    lists = (getattr(config, name, None) for name in KINDS)
    return list(next((kinds for kinds in lists if isinstance(kinds, list | tuple)), ()))


def _export_whole(config: PretrainedConfig, model: PreTrainedModel) -> ir.Model:
    graph_model = _trace(model)
    if is_encoder(config):
        del graph_model.graph.outputs[1:]
        ir_passes.RemoveUnusedNodesPass()(graph_model)
    if len(graph_model.graph.outputs) != 1:
        raise _unsupported(config, "it gives more than logits")
    kinds = kinds_of(config)
    n_attention = sum(node.op_type in ("Attention", "SinkAttention") for node in graph_model.graph)
    if has_own_attention(config):
        graph_model.metadata_props[SPELLED_OUT] = "yes"
        graph_model.metadata_props.update({BOTH_WAYS: "yes"} if is_encoder(config) else {})
    elif n_attention != (n := config.num_hidden_layers - count_without_attention(config, kinds, graph_model.graph)):
        which = "fewer" if n_attention < n else "more"
        raise _unsupported(config, f"it has {which} attentions than layers")
    check_experts(config, model, graph_model.graph)
    _number_layers(graph_model.graph)
    _forget_weights(graph_model, model)
    simplify(graph_model)
    try:
        drop_masks(graph_model.graph, max_tokens(config))
    except LlmcError as error:
        raise _unsupported(config, error.fact) from error
    ir_passes.RemoveUnusedNodesPass()(graph_model)
    if has_own_attention(config):  # whose masks and angles are made ahead, in each layer the same
        ir_passes.DeduplicateHashedInitializersPass(size_limit=MOST_ELEMENTS)(graph_model)
        ir_passes.CommonSubexpressionEliminationPass()(graph_model)
        _name_constants(graph_model.graph)
    _rename_dims(graph_model)
    _drop_remarks(graph_model)
    return graph_model


def _number_layers(graph: ir.Graph) -> None:
    """Number those attentions by their order that do not know which layer they are of."""
    for number, node in enumerate(node for node in graph if "llmc.layer" in node.metadata_props):
        if not node.metadata_props["llmc.layer"]:
            node.metadata_props["llmc.layer"] = str(number)


def _name_constants(graph: ir.Graph) -> None:
    """Constants are no layer's: those that all layers share have the first one's name until then."""
    constants = [value for value in graph.initializers.values() if value.const_value is not None]
    for number, value in enumerate(constants):
        value.name = f"constant.{number}"


def _export_repeated(config: PretrainedConfig, model: PreTrainedModel) -> ir.Model | None:
    """The graph from that of its first layers, if it is these repeated and has the whole model's weights."""
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    shortened = shorten(config)
    if shortened is None or len(stacks) != 1:
        return None
    short, how = shortened
    graph_model = _export_whole(short, _build_without_memory(short))
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


def _attention_node(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, S, D], key and value [B, KH, S, D], s_aux (sinks) [H] -> [B, S, H, D], as one graph node; its mask
    is one more operand until drop_masks."""
    unknown = next((name for name in UNKNOWN if others.get(name) is not None), None)
    if unknown:
        raise _unsupported(module.config, f"its attention takes {unknown}")
    is_causal = getattr(module, "is_causal", True)
    if not is_causal and s_aux is not None:
        raise _unsupported(module.config, "its attention is not causal, and has sinks")
    window = _window(module, sliding_window) if is_causal else 0
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    settings: dict[str, Any] = {"scale": scale, "softcap": float(softcap or 0.0)}
    operands = [query, key, value, *([] if s_aux is None else [s_aux])]
    result = torch.onnx.ops.symbolic(
        "Attention" if s_aux is None else f"{DOMAIN}::SinkAttention",
        [*operands, *([] if attention_mask is None else [attention_mask])],
        settings | ({"is_causal": int(is_causal)} if s_aux is None else {"window": window}),
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=OPSET if s_aux is None else VERSION,
        metadata_props={"llmc.layer": str(getattr(module, "layer_idx", "")), "llmc.window": str(window)},
    )
    return result.transpose(1, 2).contiguous(), None  # as transformers' own gives it: some models view it


def _window(module: torch.nn.Module, passed: int | None) -> int:
    """The layer's sliding window, 0 for none, or its chunk, negative.  What a model passes on is not always what its
    own mask says."""
    kinds = getattr(module.config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else None
    if kind == "full_attention" or kind in WITH_ATTENTION:
        return 0
    if kind == CHUNKED:
        return -int(getattr(module.config, "attention_chunk_size", None) or 0)
    if kind not in (None, "sliding_attention") or (kind and not passed):
        raise _unsupported(module.config, f"its layers of kind {kind} are not compiled yet")
    return passed or 0


AttentionInterface.register(INTERFACE, _attention_node)
AttentionMaskInterface.register(INTERFACE, exported_mask)


def _build_without_memory(config: PretrainedConfig) -> PreTrainedModel:
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
    # On "meta" they would clash with the buffers' device; as fake tensors they are on the CPU like everything else.
    fakes: dict[int, torch.nn.Parameter] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
                    module._parameters[name] = fakes.setdefault(id(parameter), fake)
    return model


def _trace(model: PreTrainedModel) -> ir.Model:
    mode = next(model.parameters()).fake_mode
    with mode:
        input_ids, position_ids = (torch.zeros(EXAMPLE_SHAPE, dtype=torch.long) for _ in range(2))
    dims = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=_longest(model.config))}
    known = signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    arguments = {name: argument for name, argument in arguments.items() if name in known}
    n_types = n_token_types(model) if is_classifier(model.config) else 1
    if n_types > 1:
        with mode:
            arguments["token_type_ids"] = torch.zeros(EXAMPLE_SHAPE, dtype=torch.long)
    if is_classifier(model.config):
        model.config.pad_token_id = -1  # no text is filled up: its last token is the last one, whichever that is
    shapes: dict[str, Any] = dict.fromkeys(arguments, dims)
    model.config.use_cache = False
    if "use_cache" in known:
        arguments["use_cache"], shapes["use_cache"] = False, None
    with (
        torch.no_grad(),
        ComplexPairs(),
        as_nodes(model),
        redirect_stderr(StringIO()),
    ):  # it prints the graph in which it got stuck
        program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)
    exported = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.slice_scatter.default: _slice_scatter},
    )
    assert exported is not None
    if is_encoder(model.config) and (first := first_position(model)):
        shift_positions(exported.model, first)
    if n_types > 1:
        separate_types(exported.model, model.get_input_embeddings().num_embeddings, n_types)
    if "position_ids" not in arguments:  # the model asks for no positions: they are an input that nothing takes
        inputs = exported.model.graph.inputs
        inputs.append(ir.Value(name="position_ids", shape=inputs[0].shape, type=inputs[0].type))
    return exported.model


def _longest(config: PretrainedConfig) -> int | None:
    """The sequences that a graph is traced for: where masks are made ahead, for those that are cut from them."""
    limit = max_tokens(config)
    return limit - 1 if has_own_attention(config) and limit > EXAMPLE_SHAPE[1] else None


def _slice_scatter(x: Any, part: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """x with `part` in the place of x[start:end:step] along `dim`, as a model has it that writes a tensor piece by
    piece: in ONNX what stands before the part, the part, and what stands behind it; with steps, a choice of both."""
    if step != 1:
        size = x.shape[dim]
        order = list(range(size))
        written = range(size)[slice(start, end, step)]
        order[written.start : written.stop : step] = range(size, size + len(written))
        both = onnx_op.Concat(x, part, axis=dim)
        return onnx_op.Gather(both, onnx_op.Constant(value_ints=order), axis=dim)
    pieces = [part]
    axis = onnx_op.Constant(value_ints=[dim])

    def cut(first: int, last: int) -> Any:
        return onnx_op.Slice(x, onnx_op.Constant(value_ints=[first]), onnx_op.Constant(value_ints=[last]), axis)

    if start:
        pieces.insert(0, cut(0, start))
    if end is not None and end < torch.iinfo(torch.int64).max:
        pieces.append(cut(end, torch.iinfo(torch.int64).max))
    return onnx_op.Concat(*pieces, axis=dim) if len(pieces) > 1 else onnx_op.Identity(part)


def _forget_weights(graph_model: ir.Model, model: PreTrainedModel) -> None:
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


def _rename_dims(model: ir.Model) -> None:
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


def _drop_remarks(model: ir.Model) -> None:
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


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: PyTorch makes one of its own of it in C++, which names it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    """The line that says what was wrong: the first one of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("Constraints violated"):  # what torch.export found out about a length
        return "its code is for sequences of certain lengths alone"
    return f"{type(error).__name__}: {lines[0]}"[:300]

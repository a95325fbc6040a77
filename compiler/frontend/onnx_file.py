"""An .onnx file as a model: checked, in float32, its weights unread.

What comes out is the file's own graph, whatever its inputs are: passes make a plain function of a whole sequence of it
(passes/__init__.py, `file_steps`).  Floats are float32 throughout, since the graph is; how the file keeps its weights
is known to each `Weight`.  Large weights lie in files beside it and are read when they are packed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from google.protobuf.message import DecodeError

from llmc.compiler.frontend.onnx_tensors import BYTES, check_tensors, tensors_of, weight_of
from llmc.compiler.graph import ints_constant, name_results, unused_name
from llmc.compiler.ops import OPSET
from llmc.compiler.weights import StoredDType, Weight
from llmc.runtime.errors import LlmcError
from llmc.runtime.read_file import refuse_pipe

FIRST_OPSET, LAST_OPSET = 13, 25
MOST_BYTES = 2 << 30
"""The most bytes of a protobuf message: larger weights lie in files of their own."""
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
OLD_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL2")
MOST_NODES = 1 << 17
"""The most nodes; a decoder of a hundred layers has some 30,000."""
MICROSOFT = "com.microsoft"
STANDARDISED = frozenset(
    (
        *("SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "Gelu", "BiasGelu", "FastGelu", "QuickGelu"),
        *("FusedGemm", "FusedMatMul", "RotaryEmbedding", "GroupQueryAttention", "MultiHeadAttention"),
    )
)
"""Operators of ONNX Runtime that passes/standardise_operators.py knows the definitions of."""
POSITION_TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (1, 2, 3)}
"""Inputs that hold cosines and sines."""
SAMPLE_BYTES = 4096
OURS = re.compile(r"tokens|positions|position_ids|page_table|rows|[kv]_cache\..*|(%|result\.).*")
"""Names that a step graph's inputs and values get, which nothing of a file may have."""
SMALL = 16
"""Equal constants of up to so many elements become one."""


@dataclass(frozen=True)
class OnnxFile:
    """path: the file.  graph: in float32, opset 23; its float initializers are `Weight`s in the dtype of the file, or
    plain float32 tensors where they only make up positions.  weights: the former, by name.  is_float32: whether the
    file itself computes in float32.  dtype: what most of its weights are kept in."""

    path: Path
    graph: ir.Model
    weights: Mapping[str, Weight]
    is_float32: bool
    dtype: StoredDType
    n_vocab: int
    digest: bytes


def open_onnx(path: Path) -> OnnxFile:
    """Read the graph of a causal decoder and check it.  Reads no large weight.  Raises LlmcError."""
    proto, contents = parse(path)
    if not all(isinstance(text, str) and text.isprintable() for text in texts_of(proto)):
        raise LlmcError("the file is damaged: a name is no line of text", place=str(path))
    check_tensors(proto, path)
    check_operators(proto, path)
    check_names(proto.graph, path)
    check_calls(proto, path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        prepare(model)
    except LlmcError:
        raise
    except Exception as error:  # the library raises anything at all
        raise LlmcError(f"the file is no valid ONNX graph: {first_line(error)}", place=str(path)) from error
    n_vocab = check_interface(model.graph, path)
    is_float32 = not widen(model.graph)
    weights = weigh(model.graph, path)
    n_bytes: Counter[StoredDType] = Counter()
    for weight in weights.values():
        n_bytes[weight.stored_dtype] += weight.stored_bytes
    return OnnxFile(
        path,
        model,
        weights,
        is_float32,
        n_bytes.most_common(1)[0][0] if n_bytes else "f32",
        n_vocab,
        digest(contents, proto, path),
    )


def parse(path: Path) -> tuple[onnx.ModelProto, bytes]:
    """The file as it says, and its SHA-256."""
    try:
        refuse_pipe(path)
        n_bytes = path.stat().st_size
        if n_bytes > MOST_BYTES:
            raise LlmcError(f"the file has {n_bytes} bytes; a valid ONNX file has at most 2 GiB", place=str(path))
        data = path.read_bytes()
        proto = onnx.load_model_from_string(data)
    except OSError as error:
        raise LlmcError(f"the file cannot be read: {error.strerror}", place=str(path)) from error
    except (DecodeError, ValueError, RuntimeError) as error:
        raise LlmcError("the file is truncated, or is not ONNX", place=str(path)) from error
    if not proto.graph.node or not proto.opset_import:
        raise LlmcError("the file is truncated, or is not ONNX", place=str(path))
    return proto, hashlib.sha256(data).digest()


def check_operators(proto: onnx.ModelProto, path: Path) -> None:
    """Standard operators of a version that is known, and functions of the file's own made of these."""
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not FIRST_OPSET <= opset <= LAST_OPSET:
        fact = f"the graph is of opset {opset}; {FIRST_OPSET} to {LAST_OPSET} are compiled"
        raise LlmcError(fact, place=str(path), hint="export it again with a newer opset_version")
    functions = {(function.domain, function.name) for function in proto.functions}
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    for node in (node for body in bodies for node in body):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        place = f"node {node.name or ', '.join(map(str, node.output))} of {path}"
        known = node.domain in ("", "ai.onnx") or (node.domain == MICROSOFT and node.op_type in STANDARDISED)
        if not known and (node.domain, node.op_type) not in functions:
            hint = (
                "export the model without one runtime's own operators and without quantisation: llmc does both itself"
            )
            raise LlmcError(f"the operator {name} is none of standard ONNX", place=place, hint=hint)
        if any(a.name in ("to", "dtype") and a.i and a.i not in BYTES for a in node.attribute):
            raise LlmcError(f"the operator {name} makes numbers of a type that is not compiled", place=place)
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            hint = "export one decoder, not a merged one"
            raise LlmcError(f"the operator {name} branches or loops, which is not compiled", place=place, hint=hint)


def texts_of(proto: onnx.ModelProto) -> Iterator[object]:
    """All names in the file, which are passed on or told; those that are no UTF-8 come as bytes."""
    graph = proto.graph
    yield graph.name
    for node in chain(graph.node, *(function.node for function in proto.functions)):
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in tensors_of(proto):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    for value in (*graph.input, *graph.output):
        yield value.name
        yield from (size.dim_param for size in value.type.tensor_type.shape.dim)


def check_names(graph: onnx.GraphProto, path: Path) -> None:
    """Every value is made once, and before it is used."""
    known: set[object] = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                fact = f"a {node.op_type} takes {name!r}, which nothing before it makes"
                raise LlmcError(fact, place=f"node {node.name or ', '.join(map(str, node.output))} of {path}")
        for name in node.output:
            if not isinstance(name, str) or (name and name in known):
                raise LlmcError(f"the value {name!r} is made twice, or has no name", place=str(path))
        known.update(node.output)
    lost = [value.name for value in graph.output if value.name not in known]
    if lost:
        raise LlmcError(f"nothing makes the result {lost[0]!r}", place=str(path))


def check_calls(proto: onnx.ModelProto, path: Path) -> None:
    """No function calls itself, and with all of them written out the graph is no larger than a decoder's."""
    pending = {(function.domain, function.name): function.node for function in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    while pending:
        ready = [name for name, body in pending.items() if not any((n.domain, n.op_type) in pending for n in body)]
        if not ready:
            raise LlmcError(f"the function {next(iter(pending))[1]} calls itself", place=str(path))
        sizes |= {name: min(MOST_NODES + 1, written_out(pending.pop(name), sizes)) for name in ready}
    n_nodes = written_out(proto.graph.node, sizes)
    if n_nodes > MOST_NODES:
        raise LlmcError(f"the graph has more than {MOST_NODES} nodes, its functions written out", place=str(path))


def written_out(nodes: Iterable[onnx.NodeProto], sizes: Mapping[tuple[str, str], int]) -> int:
    """How many nodes these become when functions are written out.  sizes: of functions."""
    return sum(sizes.get((node.domain, node.op_type), 1) for node in nodes)


def prepare(model: ir.Model) -> None:
    """One graph of opset 23: functions inlined, constants as initializers, older forms of operators as newer ones."""
    model.graph.opset_imports.pop("ai.onnx", None)
    for run in (
        ir_passes.InlinePass(),
        ir_passes.RemoveInitializersFromInputsPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.IdentityEliminationPass(),
        ir_passes.DeduplicateInitializersPass(size_limit=SMALL),
        ir_passes.RemoveUnusedNodesPass(),
    ):
        run(model)
    graph = model.graph
    rename(graph)
    model.functions.clear()
    for node in graph:
        modernise(graph, node)
        while len(node.outputs) > 1 and not node.outputs[-1].uses() and not node.outputs[-1].is_graph_output():
            if node.op_type == "Split":
                break
            node.resize_outputs(len(node.outputs) - 1)
    graph.opset_imports.clear()
    graph.opset_imports[""] = OPSET
    if any(node.domain == MICROSOFT for node in graph):
        graph.opset_imports[MICROSOFT] = 1
    model.ir_version = 10
    for thing in (model, graph, *graph, *graph.inputs, *(value for node in graph for value in node.outputs)):
        thing.metadata_props.clear()


def rename(graph: ir.Graph) -> None:
    """Rename what has a name that passes give to values of their own; other weights keep their names."""
    for name, value in list(graph.initializers.items()):
        if OURS.fullmatch(name):
            value.name = unused_name(graph, f"{name}.file")
    name_results(graph, "result.")


def modernise(graph: ir.Graph, node: ir.Node) -> None:
    if node.domain == "ai.onnx":
        node.domain = ""
    if node.op_type in OLD_REDUCTIONS and "axes" in node.attributes and len(node.inputs) == 1:
        axes = node.attributes.pop("axes").as_ints()
        node.resize_inputs(2)
        node.replace_input_with(1, ints_constant(graph, axes))
    if node.op_type == "Split" and len([v for v in node.inputs if v]) == 1:
        node.attributes.setdefault("num_outputs", ir.AttrInt64("num_outputs", len(node.outputs)))


def check_interface(graph: ir.Graph, path: Path) -> int:
    """`input_ids` in, `logits` out.  -> the number of tokens there are."""
    ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
    names = ", ".join(str(value.name) for value in graph.inputs)
    if ids is None or ids.dtype != ir.DataType.INT64 or len(ids.shape or ()) != 2:
        fact = "the graph has no input input_ids, int64 [batch, sequence]"
        raise LlmcError(
            fact, place=str(path), hint=f"its inputs are {names}; a causal decoder of token ids is compiled"
        )
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    size = logits.shape[-1] if logits is not None and logits.shape is not None and len(logits.shape) == 3 else None
    if not isinstance(size, int):
        outputs = ", ".join(f"{value.name} {value.shape}" for value in graph.outputs)
        fact = "the graph has no result logits [batch, sequence, vocabulary]"
        raise LlmcError(fact, place=str(path), hint=f"its results are {outputs}")
    fixed = [int(str(n)) for n in ids.shape or () if isinstance(n, int)]
    if fixed:
        fact = f"input_ids has the fixed shape {ids.shape}"
        raise LlmcError(fact, place=str(path), hint="export it with dynamic axes for the batch and the sequence")
    return size


def widen(graph: ir.Graph) -> bool:
    """Let every float be float32, in place.  -> whether one was narrower."""
    found = False
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.type == ir.AttributeType.INT and attribute.value in NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                found = True
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in NARROW:
                tensor = ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, tensor)
                found = True
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.dtype in NARROW or (value.const_value is not None and value.const_value.dtype in NARROW):
            value.dtype = ir.DataType.FLOAT
            found = True
    return found


def weigh(graph: ir.Graph, path: Path) -> dict[str, Weight]:
    """Give initializers their weights: unread, kept as in the file; what makes up positions becomes float32."""
    weights: dict[str, Weight] = {}
    meet_tokens = weights_among(graph)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise LlmcError(f"the weight {name} has no values", place=str(path))
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        if tensor.dtype not in (ir.DataType.FLOAT, *NARROW):
            value.const_value = ir.tensor(tensor.numpy(), name=name)
            continue
        value.dtype = ir.DataType.FLOAT
        if tensor.size > 1 and value in meet_tokens:
            weights[name] = weight_of(tensor, name, path)
            value.const_value = weights[name]
        else:
            value.const_value = ir.tensor(weight_of(tensor, name, path).numpy(), name=name)
    return weights


def activations(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on the tokens themselves."""
    found = {value for value in graph.inputs if value.name == "input_ids"}
    for node in graph:
        if node.op_type != "Shape" and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def weights_among(graph: ir.Graph) -> set[ir.Value]:
    """Values that meet activations or are looked up in, and the values of which only such are made."""
    acts = activations(graph)
    found: set[ir.Value] = set()
    for node in reversed(graph):
        meets = any(result in acts for result in node.outputs)
        made_of_it = any(result in found for result in node.outputs)
        made = {value for value in node.inputs if value is not None and not value.is_initializer()}
        for index, value in enumerate(node.inputs):
            if value is None or index in POSITION_TABLES.get(node.op_type, ()):
                continue
            if meets or (made_of_it and made <= {value}) or (index == 0 and is_lookup(node, value)):
                found.add(value)
    return found


def is_lookup(node: ir.Node, table: ir.Value) -> bool:
    shape = table.const_value.shape if table.const_value is not None else table.shape
    return node.op_type == "Gather" and shape is not None and len(shape) == 2


def digest(contents: bytes, proto: onnx.ModelProto, path: Path) -> bytes:
    """Tells files apart: by the file's contents, and a few KiB from the middle of each tensor beside it."""
    found = hashlib.sha256(contents)
    for tensor in tensors_of(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
            n_bytes = prod(tensor.dims) * BYTES[tensor.data_type]
            with (path.parent / where["location"]).open("rb") as stream:
                stream.seek(int(where.get("offset") or 0) + max(0, n_bytes - SAMPLE_BYTES) // 2)
                found.update(stream.read(min(n_bytes, SAMPLE_BYTES)))
    return found.digest()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]

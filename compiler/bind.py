"""Bind the step graph's symbols to numbers, and put each node to the schedules as a `Call`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import onnx_ir as ir

from llmc.compiler.kernel import PAGE_TOKENS, QUERY_ROWS, Call, DType, TensorType
from llmc.compiler.ops import (
    ADD_GIVEN,
    DISTANCE_PAGED_ATTENTION,
    LOW_RANKS,
    OF_PATCHES,
    OPERATORS,
    PLACE,
    TAKE_FIRST,
    TAKE_GIVEN,
    appended_parts,
)
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.runtime.errors import LlmcError

STEP_INPUTS = {
    name: name
    for name in ("tokens", "positions", "page_table", "rows", "slots", "adapters", "is_given", "given", "sees", "turns")
}
"""Graph inputs that the runtime fills for each step, and the space of the artifact's format they lie in."""

MOST_TILED_DIM = 256
"""The longest heads with which attention reads queries, keys and values from tiles."""

ALIASES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators that only rename memory."""

IN_PLACE = {name: 0 for name, parts in LOW_RANKS.items() if not parts.activation}
IN_PLACE |= dict.fromkeys((TAKE_GIVEN, TAKE_FIRST, ADD_GIVEN), 0)
"""Operators of ours whose result takes the place of one of their operands, which nobody else uses: which one."""

SMALL = 64
"""Integer constants of at most this many elements are axes, shapes and the like: a schedule may want their values."""

DTYPES: Mapping[ir.DataType, DType] = {
    ir.DataType.FLOAT: "f32",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT16: "f16",
    ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32",
    ir.DataType.INT8: "i8",
    ir.DataType.UINT8: "u8",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class Binding:
    """What turns the nodes of a step graph into calls.

    sizes       numbers for the symbols M, R, P, n_pages and n_slots
    kv_dtype    how the KV cache is stored
    n_layers    how many layers have a part of it
    tiled       values that lie in tiles, with their dtype
    queries     queries that lie as a page's keys do, with their dtype
    slot_bytes  of all states of a slot
    page_bytes  of a page whose layers differ in size; 0: they are all alike
    """

    sizes: Mapping[str, int]
    kv_dtype: str
    n_layers: int
    tiled: Mapping[ir.Value, DType] = field(default_factory=dict)
    queries: Mapping[ir.Value, DType] = field(default_factory=dict)
    slot_bytes: int = 0
    page_bytes: int = 0

    def type_of(self, value: ir.Value) -> TensorType:
        """The bound type of an activation or step input."""
        if value.name in STEP_INPUTS or value.name in OF_PATCHES:
            return TensorType(shape_of(value, self), "f32" if value.dtype == ir.DataType.FLOAT else "i32")
        if value in self.tiled:
            return TensorType(shape_of(value, self), self.tiled[value], tiled=True)
        if value in self.queries:
            return TensorType(query_shape(value, shape_of(value, self)), self.queries[value])
        if value.dtype is None or value.dtype not in DTYPES:
            raise LlmcError(f"a value of type {value.dtype} cannot be planned", place=f"value {value.name}")
        return TensorType(shape_of(value, self), DTYPES[value.dtype])


def shape_of(value: ir.Value, binding: Binding) -> tuple[int, ...]:
    """The value's shape in numbers."""
    if value.shape is None:
        raise LlmcError("a value without a shape cannot be planned", place=f"value {value.name}")
    return tuple(d if isinstance(d, int) else size_of(d, value, binding) for d in value.shape)


def size_of(dim: ir.SymbolicDim, value: ir.Value, binding: Binding) -> int:
    if dim.value not in binding.sizes:
        raise LlmcError(f"dimension {dim.value!r} is not one of {sorted(binding.sizes)}", place=f"value {value.name}")
    return binding.sizes[str(dim.value)]


def is_constant(value: ir.Value) -> bool:
    """Known at compile time: an initializer."""
    return value.is_initializer()


def constant_type(value: ir.Value, binding: Binding) -> TensorType:
    """The type a constant is handed to the schedules in: weights in the dtype they are stored in."""
    tensor = value.const_value
    if tensor is None:
        raise LlmcError("a weight has no source", place=f"weight {value.name}")
    shape = tuple(d for d in tensor.shape if isinstance(d, int))
    if tensor.dtype != ir.DataType.FLOAT:
        return TensorType(shape, DTYPES[tensor.dtype], constant=True)
    stored = getattr(tensor, "stored_dtype", "f32")
    return TensorType(shape, cast(DType, stored), constant=True, group=getattr(tensor, "group", 0))


def call_of(node: ir.Node, binding: Binding) -> Call:
    """The question a node puts to the schedules. Layers that ask the same question give equal calls."""
    inputs = tuple(None if value is None else input_type(value, binding) for value in node.inputs)
    outputs = tuple(binding.type_of(value) for value in node.outputs)
    attributes: dict[str, Any] = {name: plain(attribute.value) for name, attribute in node.attributes.items()}
    for index, value in enumerate(node.inputs):
        if value is not None and is_constant(value) and holds_settings(value):
            attributes[f"input.{index}"] = plain(cast(Any, value.const_value).numpy().tolist())
    if "layer" in attributes:
        del attributes["layer"]
        attributes |= {"n_layers": binding.n_layers, "kv_dtype": binding.kv_dtype, "page_tokens": PAGE_TOKENS}
        attributes |= {"page_bytes": binding.page_bytes} if binding.page_bytes else {}
    attributes |= beside_norm(node, binding)
    if PLACE in attributes:
        del attributes[PLACE]
        attributes["slot_bytes"] = binding.slot_bytes
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Call(op, inputs, outputs, tuple(sorted(attributes.items())))


def beside_norm(node: ir.Node, binding: Binding) -> dict[str, str]:
    """An attribute for a product on one side of a deferred norm: how the other product's weight is stored, if that is
    another way than its own.  "behind": the other one applies the norm; "in_front": the other one prepares it."""
    if node.domain != "llmc":
        return {}
    if node.op_type.endswith("Moments"):
        side, others = "behind", [use.node for use in node.outputs[2].uses()]
    elif node.op_type.startswith("Deferred"):
        moments = node.inputs[OPERATORS[node.op_type].inputs.index("moments")]
        side, others = "in_front", [maker] if moments and (maker := moments.producer()) else []
    else:
        return {}
    own = stored_in(node, binding)
    differing = [dtype for other in others if (dtype := stored_in(other, binding)) != own]
    return {side: differing[0]} if differing else {}


def stored_in(node: ir.Node, binding: Binding) -> DType:
    """What a product's weight is stored in."""
    weight = node.inputs[OPERATORS[node.op_type].inputs.index("weight")]
    assert weight is not None
    return constant_type(weight, binding).dtype


def tiled_values(graph: ir.Graph) -> dict[ir.Value, DType]:
    """For a GPU: values that only matrix products read, and round to the dtype of their weights.  They are better
    written in that dtype, and in the order that products want.  Each with that dtype (bf16 or f16)."""
    found: dict[ir.Value, DType] = {}
    for value in (value for node in graph if writes_tiles(node) for value in node.outputs[:2]):
        dtypes = {weight_dtype(use.node) if use.idx == multiplied(use.node) else None for use in value.uses()}
        if len(dtypes) == 1 and (dtype := dtypes.pop()) and not value.is_graph_output():
            found[value] = dtype
    return found


def attended_values(graph: ir.Graph, kv_dtype: str) -> dict[ir.Value, DType]:
    """For a GPU, in steps of many rows: queries, keys and values that a product makes for attention alone, which rounds
    them to the dtype of its cache, that of the product too.  Written in that dtype they are the same numbers in half
    the bytes.  (Those that are turned first are not among them: rounded twice they made the error of a Llama's logits
    15 % larger.)"""
    found: dict[ir.Value, DType] = {}
    for node in graph:
        if node.domain == "llmc" and "Linear" in node.op_type and not node.op_type.endswith("Moments"):
            value, dtype = node.outputs[0], weight_dtype(node)
            attended = [use.idx == 0 and takes_tiles(use.node) for use in value.uses()]
            if dtype and dtype == kv_dtype and attended and all(attended) and not value.is_graph_output():
                found[value] = dtype
    return found


def takes_tiles(node: ir.Node) -> bool:
    """Whether attention is of those whose kernels take tiles of queries, keys and values
    (schedules/cuda/attention/rule.py)."""
    if node.op_type not in ("PagedAttention", "BidirectionalPagedAttention", DISTANCE_PAGED_ATTENTION):
        return False
    sizes = {cache.shape[3] if cache is not None and cache.shape else None for cache in node.inputs[-2:]}
    return len(sizes) == 1 and node.attributes["head_dim"].as_int() <= MOST_TILED_DIM


def turned_queries(graph: ir.Graph) -> dict[ir.Value, DType]:
    """For a GPU: queries of products that append, which leave them as attention reads them, each with its dtype."""
    nodes = (node for node in graph if node.domain == "llmc" and appended_parts(node.op_type))
    return {node.outputs[0]: dtype for node in nodes if (dtype := weight_dtype(node))}


def query_shape(value: ir.Value, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of queries [M, H·D] that lie as a page's keys do: [tiles of 64 rows][H][D/8][64][8], M rounded up to
    whole blocks."""
    node = value.producer()
    assert node is not None
    heads, head_dim = (node.attributes[name].as_int() for name in ("num_heads", "head_dim"))
    n_tiles = -(-shape[0] // QUERY_ROWS) * QUERY_ROWS // PAGE_TOKENS
    return n_tiles, heads, head_dim // 8, PAGE_TOKENS, 8


def writes_tiles(node: ir.Node) -> bool:
    """Whether schedules for GPUs can write the node's result as tiles."""
    if node.domain != "llmc":
        return node.op_type == "Gather" and not ("axis" in node.attributes and node.attributes["axis"].as_int())
    is_gate = node.op_type in LOW_RANKS and bool(LOW_RANKS[node.op_type].activation)
    return is_gate or "Linear" in node.op_type or node.op_type.endswith(("Attention", "HeadProduct"))


def multiplied(node: ir.Node) -> int | None:
    """The index of the operand that a product rounds and multiplies as it is: x, or what the product in front has
    scaled for a deferred norm; None for products that normalise x first, and for other nodes."""
    if node.domain == "llmc" and node.op_type in LOW_RANKS:
        return None if LOW_RANKS[node.op_type].norm else OPERATORS[node.op_type].inputs.index("x")
    if node.domain != "llmc" or not node.op_type.startswith(("Linear", "GatedLinear", "Deferred", "HeadProduct")):
        return None
    return OPERATORS[node.op_type].inputs.index("scaled") if node.op_type.startswith("Deferred") else 0


def weight_dtype(node: ir.Node) -> DType | None:
    """The dtype to which a product rounds what it multiplies."""
    weight_input = "a" if node.op_type in LOW_RANKS else "weight"
    value = node.inputs[OPERATORS[node.op_type].inputs.index(weight_input)]
    weight = None if value is None else value.const_value
    if isinstance(weight, QuantizedWeight):  # codes are widened to what the checkpoint had
        weight = weight.source
    stored = getattr(weight, "stored_dtype", None)
    return stored if stored in ("bf16", "f16") else None


def input_type(value: ir.Value, binding: Binding) -> TensorType:
    return constant_type(value, binding) if is_constant(value) else binding.type_of(value)


def holds_settings(value: ir.Value) -> bool:
    """A small integer constant: axes, a shape, split sizes."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= SMALL


def plain(value: Any) -> Any:
    """Lists as tuples, so that calls can be compared and hashed."""
    return tuple(plain(item) for item in value) if isinstance(value, list | tuple) else value

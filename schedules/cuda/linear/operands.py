"""What a product's kernel takes beside x and the weight, in either family, and how the constants among it lie."""

from __future__ import annotations

from llmc.compiler.kernel import Layout, Operand, RowMajor
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import InStrips


def layouts(op: LinearOp) -> dict[int, Layout]:
    """How the call's constants must lie, but for a norm's that the kernel itself puts on x."""
    weight: Layout = RowMajor("f32") if op.element == "f32" else weight_format(op).layout
    vectors = {op.bias_input: op.bias, next_weight_input(op): op.moments, folded_input(op): is_folded(op)}
    vector = InStrips("f32") if op.strips else RowMajor("f32")
    return {op.weight_input: weight, **{index: vector for index, there in vectors.items() if there}}


def next_weight_input(op: LinearOp) -> int:
    """The weight of the norm behind."""
    return op.residual_input + 1


def folded_input(op: LinearOp) -> int:
    return op.scaled_input + 2


def is_folded(op: LinearOp) -> bool:
    """Whether LayerNorm's vectors come folded, with the bias in them."""
    return op.deferred and op.norm == "layer"


def others(op: LinearOp) -> list[tuple[str, str, Operand]]:
    """Name, C type, operand."""
    y = C_TYPES[op.element] if op.tiled_y else "float"
    present = (
        (op.bias and not is_folded(op), "bias", "const float", Operand("input", op.bias_input)),
        (op.residual, "residual", "const float", Operand("input", op.residual_input)),
        (op.deferred, "moments", "const float2", Operand("input", op.scaled_input + 1)),
        (is_folded(op), "folded", "const float", Operand("input", folded_input(op))),
        (op.moments, "next_weight", "const float", Operand("input", next_weight_input(op))),
        (not op.append, "y", y, Operand("output", 0)),
        (op.moments, "scaled", C_TYPES[op.element], Operand("output", 1)),
        (op.moments, "next_moments", "float2", Operand("output", 2)),
    )
    return [(name, kind, operand) for there, name, kind, operand in present if there] + appended(op)


def appended(op: LinearOp) -> list[tuple[str, str, Operand]]:
    """The same of a product that appends, in the order of include/gemm_append.cuh's HandedOn."""
    if op.append is None:
        return []
    tables = [("cos", "const float"), ("sin", "const float")] if op.append.rotary_dim else []
    read = [*tables, ("positions", "const int"), ("page_table", "const int")]
    found = [(name, kind, Operand("input", op.append_input + i)) for i, (name, kind) in enumerate(read)]
    element = C_TYPES[op.element]
    return [*found, ("kv", element, Operand("kv")), ("queries", element, Operand("output", 0))]


def other_parameters(op: LinearOp) -> str:
    """Parameters for them, each with a comma before it."""
    return "".join(f", {kind} *{name}" for name, kind, _ in others(op))


def epilogue(op: LinearOp) -> str:
    """The kernel's `Epilogue<Layer>` (include/epilogue.cuh)."""
    bias = f"folded + {op.rows}" if is_folded(op) else "bias" if op.bias else "nullptr"
    parts = [bias, "residual" if op.residual else "nullptr", "nullptr" if op.append else "y"]
    if op.moments:
        parts.append("{next_weight, scaled, next_moments}")
    elif op.append:
        angles = "cos, sin" if op.append.rotary_dim else "nullptr, nullptr"
        parts.append(f"{{{angles}, positions, page_table, kv, queries}}")
    elif op.deferred:
        parts.append("{}")
    if op.deferred:
        parts.append(f"{{moments, {'folded' if is_folded(op) else 'nullptr'}}}")
    return f"Epilogue<Layer>{{{', '.join(parts)}}}"

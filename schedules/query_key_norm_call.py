"""What a call of llmc.QueryKeyRMSNorm says, for the schedules of every target, and its one launch."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor


@dataclass(frozen=True)
class NormedParts:
    """`rows` rows of `columns` elements, of which the first `queries` are normalised together, and then `keys`."""

    rows: int
    columns: int
    queries: int
    keys: int
    epsilon: float


def parse(call: Call) -> NormedParts | None:
    """None: another call, or one that is not of float32 with constant weights."""
    if call.op != "llmc.QueryKeyRMSNorm":
        return None
    qkv, *weights = call.inputs
    if qkv is None or qkv.dtype != "f32" or any(weight is None or not weight.constant for weight in weights):
        return None
    (rows, columns), (queries, keys) = qkv.shape, (weight.shape[0] for weight in weights if weight)
    return NormedParts(rows, columns, queries, keys, float(call.attribute("epsilon")))


def launched(parts: NormedParts, kernel: Kernel) -> Implementation:
    """One launch of a kernel (qkv, query_norm, key_norm, y), all f32, in which a row is a unit of work."""
    normed = parts.queries + parts.keys
    launch = Launch(
        kernel,
        (*(Operand("input", index) for index in range(3)), Operand("output", 0)),
        parts.rows,
        8 * parts.rows * parts.columns + 4 * normed,
        4 * parts.rows * normed,
    )
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in (1, 2)})

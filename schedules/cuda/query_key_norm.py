"""Queries and keys normalised where they lie, beside values that stay as they are, on a GPU: llmc.QueryKeyRMSNorm.

One launch, a block a row (include/norm_parts.cuh).  All is f32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

WARPS = 8


@dataclass(frozen=True)
class QueryKeyNorm:
    """`rows` rows of `columns` elements, of which the first `queries` are normalised together, and then `keys`."""

    rows: int
    columns: int
    queries: int
    keys: int
    epsilon: float

    def __str__(self) -> str:
        return f"{32 * WARPS} threads a row"


def match(call: Call, target: Target) -> QueryKeyNorm | None:
    if call.op != "llmc.QueryKeyRMSNorm":
        return None
    qkv, *weights = call.inputs
    if qkv is None or qkv.dtype != "f32" or any(weight is None or not weight.constant for weight in weights):
        return None
    (rows, columns), (queries, keys) = qkv.shape, (weight.shape[0] for weight in weights if weight)
    if any(n % 8 for n in (queries, keys, columns)):  # parts begin at eights
        return None
    return QueryKeyNorm(rows, columns, queries, keys, float(call.attribute("epsilon")))


def implement(call: Call, norm: QueryKeyNorm, target: Target) -> Implementation:
    key = f"query_key_norm_source({norm!r})"
    name = f"query_key_norm_{norm.rows}x{norm.columns}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    source = partial(query_key_norm_source, name, norm)
    normed = norm.queries + norm.keys
    launch = Launch(
        Kernel(name, key, source, n_threads=32 * WARPS, dependent=True),
        (*(Operand("input", index) for index in range(3)), Operand("output", 0)),
        norm.rows,
        8 * norm.rows * norm.columns + 4 * normed,
        4 * norm.rows * normed,
    )
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in (1, 2)})


def query_key_norm_source(name: str, norm: QueryKeyNorm) -> str:
    """The kernel's CUDA C++."""
    return (
        '#include "norm_parts.cuh"\n\n'
        "struct Row {\n"
        f"    static constexpr int kColumns = {norm.columns}, kQueries = {norm.queries}, kKeys = {norm.keys};\n"
        f"    static constexpr int kWarps = {WARPS};\n"
        f"    static constexpr float kEpsilon = {norm.epsilon!r}f;\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * WARPS})\n'
        f"{name}(const float *qkv, const float *query_norm, const float *key_norm, float *out) {{\n"
        "    norm_parts<Row>(qkv, query_norm, key_norm, out);\n"
        "}\n"
    )


RULES = (Rule("query_key_norm", match, implement),)

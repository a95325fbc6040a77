"""Queries and keys normalised where they lie, beside values that stay as they are: llmc.QueryKeyRMSNorm.

One launch, one row a unit (row_kernels.py).  Reads and writes each row once from memory: 8 C bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class QueryKeyNorm:
    """`rows` rows of `columns` elements, of which the first `queries` are normalised together, and then `keys`."""

    rows: int
    columns: int
    queries: int
    keys: int
    epsilon: float
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> QueryKeyNorm | None:
    if call.op != "llmc.QueryKeyRMSNorm":
        return None
    qkv, *weights = call.inputs
    if qkv is None or qkv.dtype != "f32" or any(weight is None or not weight.constant for weight in weights):
        return None
    (rows, columns), (queries, keys) = qkv.shape, (weight.shape[0] for weight in weights if weight)
    return QueryKeyNorm(rows, columns, queries, keys, float(call.attribute("epsilon")), target.lanes)


def implement(call: Call, norm: QueryKeyNorm, target: Target) -> Implementation:
    key = f"build_norm({norm!r})"
    name = f"query_key_norm_{norm.rows}x{norm.columns}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    normed = norm.queries + norm.keys
    launch = Launch(
        Kernel(name, key, partial(build_norm, norm)),
        (*(Operand("input", index) for index in range(3)), Operand("output", 0)),
        norm.rows,
        8 * norm.rows * norm.columns + 4 * normed,
        4 * norm.rows * normed,
    )
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in (1, 2)})


def build_norm(norm: QueryKeyNorm) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.query_key_norm_kernel(norm)


RULES = (Rule("query_key_norm", match, implement),)

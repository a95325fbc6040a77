"""Queries and keys normalised where they lie, beside values that stay as they are: llmc.QueryKeyRMSNorm.

One launch, one row a unit (row_kernels.py).  Reads and writes each row once from memory: 8 C bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, short_hash
from llmc.compiler.target import Target
from llmc.schedules.query_key_norm_call import NormedParts, launched, parse
from llmc.schedules.rule import Rule


@dataclass(frozen=True)
class QueryKeyNorm(NormedParts):
    """lanes: of a vector."""

    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> QueryKeyNorm | None:
    parts = parse(call)
    return QueryKeyNorm(**asdict(parts), lanes=target.lanes) if parts else None


def implement(call: Call, norm: QueryKeyNorm, target: Target) -> Implementation:
    key = f"build_norm({norm!r})"
    name = f"query_key_norm_{norm.rows}x{norm.columns}_{short_hash(key)}"
    return launched(norm, Kernel(name, key, partial(build_norm, norm)))


def build_norm(norm: QueryKeyNorm) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.query_key_norm_kernel(norm)


RULES = (Rule("query_key_norm", match, implement),)

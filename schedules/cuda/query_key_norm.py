"""llmc.QueryKeyRMSNorm on a GPU: queries and keys of a row are normalised, values beside them stay as they are.

One launch, a block a row (include/norm_parts.cuh).  All is f32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from llmc.compiler.kernel import Call, Implementation, Kernel, short_hash
from llmc.compiler.target import Target
from llmc.schedules.query_key_norm_call import NormedParts, launched, parse
from llmc.schedules.rule import Rule

WARPS = 8


@dataclass(frozen=True)
class QueryKeyNorm(NormedParts):
    """Parts of a row, each of which begins at a multiple of eight columns."""

    def __str__(self) -> str:
        return f"{32 * WARPS} threads a row"


def match(call: Call, target: Target) -> QueryKeyNorm | None:
    parts = parse(call)
    if parts is None or any(n % 8 for n in (parts.queries, parts.keys, parts.columns)):
        return None
    return QueryKeyNorm(**asdict(parts))


def implement(call: Call, norm: QueryKeyNorm, target: Target) -> Implementation:
    key = f"query_key_norm_source({norm!r})"
    name = f"query_key_norm_{norm.rows}x{norm.columns}_{short_hash(key)}"
    source = partial(query_key_norm_source, name, norm)
    return launched(norm, Kernel(name, key, source, n_threads=32 * WARPS, dependent=True))


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

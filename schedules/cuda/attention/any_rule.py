"""Attention that the faster kernels do not take: heads of more than 256 elements, values that differ in size from keys,
or the cache of another layer, which has the step's keys and values already.

Two launches for steps of any size (include/attention_any.cuh), which read and write a page as the others do, so that a
layer may share the cache of one that they serve.  It is correct first and fast second: a warp goes through all of a
row's context for each query head, and reads 2 (D + V) bytes a token in a 2-byte dtype, which heads of a group mostly
find in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmc.compiler.kernel import DTYPE_BYTES, PAGE_TOKENS, Call, Implementation, Launch, Operand
from llmc.compiler.target import Target
from llmc.schedules.attention_call import NORMS, input_places, weight_layouts
from llmc.schedules.cuda.attention.kernel import ADDED, ANY_APPEND, ANY_ATTEND, Argument, kernel_of
from llmc.schedules.cuda.attention.shape import Attention, parse, takes_any
from llmc.schedules.rule import Rule

THREADS = 128


@dataclass(frozen=True)
class Any:
    """These kernels have no parameters to choose."""

    def __str__(self) -> str:
        return "a warp for each row and head"


def match(call: Call, target: Target) -> Any | None:
    a = parse(call)
    return Any() if a is not None and takes_any(a) else None


def implement(call: Call, params: Any, target: Target) -> Implementation:
    a = parse(call)
    assert a is not None, "implement follows match"
    places = input_places(call)
    types = {"qkv": "const float"} | dict.fromkeys((*NORMS, "cos", "sin", *ADDED), "const float")
    types |= {"positions": "const int", "page_table": "const int"}
    names = ["qkv" if name == "queries" else name for name in places]
    given = [Argument(name, types[name], Operand("input", i)) for i, name in enumerate(names) if name in types]
    kv, queries = Argument("kv", "Kv", Operand("kv")), Argument("queries", "float", Operand("temp"))
    heads = [x for x in given if x.name in ADDED]
    reads = [x for x in given if x.name not in ADDED]
    out = Argument("out", "Out", Operand("output"))
    sees = [queries, *(x for x in reads if x.name in ("positions", "page_table")), *heads, kv, out]
    shape = source(a)
    n_queries, n_results = a.rows * a.heads * a.head_dim, a.rows * a.heads * a.value_dim
    kept = 0 if a.reads_only else a.rows * (a.layer_bytes // PAGE_TOKENS)
    append = Launch(
        kernel_of("any_append", a, shape, (*reads, kv, queries), ANY_APPEND, THREADS, 0),
        tuple(x.operand for x in (*reads, kv, queries)),
        a.rows,
        8 * n_queries + 3 * kept,
        3 * a.rows * (a.heads + a.kv_heads) * a.head_dim,
    )
    attend = Launch(
        kernel_of("any", a, shape, sees, ANY_ATTEND, THREADS, 0),
        tuple(x.operand for x in sees),
        -(-a.rows * a.heads * 32 // THREADS),
        a.rows * a.context * (a.layer_bytes // PAGE_TOKENS) + 4 * n_queries + DTYPE_BYTES[a.out] * n_results,
        2 * a.context * (n_queries + n_results),
    )
    return Implementation(
        (append, attend), (4 * n_queries,), kv_layer_bytes=a.layer_bytes, layouts=weight_layouts(call)
    )


def source(a: Attention) -> str:
    """Shape: its head_dim is a value's, as that of a result."""
    page_bytes = a.page_bytes or a.n_layers * a.layer_bytes
    of_value = replace(a, head_dim=a.value_dim, own_value_dim=0, page_bytes=page_bytes)
    return of_value.source(key_dim=a.head_dim, appends=int(not a.reads_only))


RULES = (Rule("attention_any", match, implement),)

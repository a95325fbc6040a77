"""The kernels of paged attention as CUDA C++: each is one call of a header (include/attention_….cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from llmc.compiler.kernel import Kernel, Operand, short_hash
from llmc.schedules.attention_call import BIASES, NORMS, OF_HEADS
from llmc.schedules.cuda.attention.shape import Attention

STREAM = (
    "attention_stream<Shape>({qkv}, {cos}, {sin}, positions, page_table, kv, out, {partial}, {counters}{of_heads});"
)
APPEND = "attention_append<Shape>({qkv}, {cos}, {sin}, positions, page_table, kv, queries);"
APPEND_CODES = APPEND.replace("append", "append_codes")
APPEND_VECTORS = APPEND.replace("attention_append", "append_vectors")
ATTEND_TILE = "attention_tile<Shape>(queries, positions, page_table, kv, out{of_heads});"
ATTEND_WGMMA = "attention_wgmma<Shape>(queries, positions, page_table, kv, out{of_heads});"
FLOAT32_APPEND = "float32_append<Shape>({qkv}, {cos}, {sin}, positions, page_table, kv, queries);"
FLOAT32_ATTEND = "float32_attend<Shape>(queries, positions, page_table, kv, out{of_heads});"
ANY_APPEND = "any_append<Shape>({qkv}, {query_norm}, {key_norm}, {cos}, {sin}, positions, page_table, kv, queries);"
ANY_ATTEND = "any_attend<Shape>(queries, positions, page_table, kv, out{of_heads});"
SINKS, SLOPES = OF_HEADS
ADDED = (*OF_HEADS, BIASES)
"""Inputs that are added to scores, or, for sinks, to the sum of their exponentials."""
HEADERS = {STREAM: "stream", APPEND: "rows", APPEND_CODES: "widen", APPEND_VECTORS: "vectors"}
HEADERS |= {ATTEND_TILE: "tile", ATTEND_WGMMA: "wgmma", ANY_APPEND: "any", ANY_ATTEND: "any"}
"""include/attention_….cuh that defines what a kernel calls; attention_float32.cuh all else."""


@dataclass(frozen=True)
class Argument:
    """A pointer that a kernel takes: `type *name`, the types of Shape or C++'s own."""

    name: str
    type: str
    operand: Operand


def inputs(a: Attention) -> tuple[Argument, ...]:
    """The call's inputs that kernels read: cos and sin if something is turned, sinks, slopes or biases if heads have
    any."""
    vectors = (*(NORMS if a.epsilon is not None else ()), *(("cos", "sin") if a.rotary_dim else ()))
    vectors += (SINKS,) * a.sinks + (SLOPES,) * a.slopes + (BIASES,) * bool(a.reach)
    types = {"qkv": f"const {a.types['Qkv']}"} | dict.fromkeys(vectors, "const float")
    types |= {"positions": "const int", "page_table": "const int"}
    return tuple(Argument(name, kind, Operand("input", i)) for i, (name, kind) in enumerate(types.items()))


def apart(reads: tuple[Argument, ...]) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """The inputs that the appending launch reads, and those that the attending one reads, which gets queries from the
    former."""
    appends = tuple(argument for argument in reads if argument.name not in ADDED)
    return appends, (*appends[-2:], *(argument for argument in reads if argument.name in ADDED))


def kernel_of(
    name: str,
    a: Attention,
    shape: str,
    arguments: Sequence[Argument],
    call: str,
    n_threads: int,
    shared_bytes: int,
    resident: int = 1,
) -> Kernel:
    """A kernel that is one call of include/attention_<…>.cuh; pointers in braces are null where there are none."""
    names = {argument.name for argument in arguments}
    optional = ("qkv", *NORMS, "cos", "sin", "partial", "counters")
    pointers = {pointer: pointer if pointer in names else "nullptr" for pointer in optional}
    added = next((name for name in (SLOPES, BIASES) if name in names), "")
    pointers["of_heads"] = ", sinks" if SINKS in names else f", nullptr, {added}" if added else ""
    if names.issuperset(NORMS) and call is not ANY_APPEND:
        pointers["qkv"] = f"{{{', '.join(('qkv', *NORMS))}}}"
    body = call.format(**pointers)
    parameters = ", ".join(f"{a.types.get(x.type, x.type)} *{x.name}" for x in arguments)
    header = f'#include "attention_{HEADERS.get(call, "float32")}.cuh"'
    bounds = f'extern "C" __global__ void __launch_bounds__({n_threads}, {resident})'
    digest = short_hash(f"{shape}{parameters}{body}")
    full = f"attention_{name}_{a.kv_dtype}_m{a.rows}_h{a.heads}_kh{a.kv_heads}_d{a.head_dim}_{digest}"
    text = f"{header}\n\n{shape}\n\n{bounds} {full}({parameters}) {{\n    {body}\n}}\n"
    return Kernel(full, text, partial(str, text), n_threads=n_threads, shared_bytes=shared_bytes, dependent=True)

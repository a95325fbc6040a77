"""Attention over a paged KV cache, with or without rotary positions.

Two launches, for a step of M rows from any mix of sequences:
    append: turn q and k by their positions, write k and v into the pages       (attention_append.py)
    attend: an online softmax over each row's own pages, 64 tokens at a time    (attention_tiles.py)

Small steps (decode) take each row by itself: all query heads of a key head meet its K and V while they are in
registers, and memory is the limit, 4 KH D bytes a token of context in bf16.  Large steps (prefill) take blocks of rows
of one sequence, and arithmetic is the limit, 4 H D operations a token of context and row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmc.compiler.kernel import PAGE_TOKENS, Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.target import Target
from llmc.schedules.cpu.attention_shape import Attention
from llmc.schedules.rule import Rule

PREFILL_ROWS = 32
"""Steps of fewer rows are taken row by row."""
QUERY_ROWS = 64
"""Most query rows (rows times heads of a group) of a block: their scores and sums stay in the second level cache."""


@dataclass(frozen=True)
class Blocks:
    """rows: of the step that go through the pages together, where they are one sequence's."""

    rows: int

    def __str__(self) -> str:
        return f"blocks of {self.rows} rows" if self.rows > 1 else "row by row"


def parse(call: Call, target: Target) -> Attention | None:
    """The attention that a call asks for, or None."""
    rotary = call.op == "llmc.RotaryPagedAttention"
    if not rotary and call.op != "llmc.PagedAttention":
        return None
    kv_dtype, tokens = call.attribute("kv_dtype"), call.attribute("page_tokens", PAGE_TOKENS)
    heads, kv_heads, head_dim = (call.attribute(name) for name in ("num_heads", "kv_num_heads", "head_dim"))
    page_table = call.inputs[4 if rotary else 2]
    if kv_dtype not in ("f32", "bf16") or tokens != PAGE_TOKENS or heads % kv_heads or head_dim % 2 or not page_table:
        return None
    return Attention(
        m=page_table.shape[0],
        pages=page_table.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=call.attribute("rotary_dim") if rotary else 0,
        interleaved=bool(call.attribute("interleaved", 0)),
        scale=float(call.attribute("scale")),
        softcap=float(call.attribute("softcap", 0.0)),
        window=call.attribute("window", 0),
        n_layers=call.attribute("n_layers"),
        dot="fma" if kv_dtype == "f32" else "dpbf16" if target.has("avx512_bf16") else "widen",
        lanes=target.lanes,
    )


def match(call: Call, target: Target) -> Blocks | None:
    attention = parse(call, target)
    if attention is None:
        return None
    return Blocks(1 if attention.m < PREFILL_ROWS else max(4, min(PREFILL_ROWS, QUERY_ROWS // attention.group)))


def space(call: Call, target: Target) -> Iterable[Blocks]:
    """Other blocks worth measuring."""
    attention = parse(call, target)
    return [Blocks(rows) for rows in (1, 8, 16, 32, 64) if attention and rows <= attention.m]


def implement(call: Call, blocks: Blocks, target: Target) -> Implementation:
    a = parse(call, target)
    assert a is not None, "implement follows match"
    names = ("qkv", "cos", "sin", "positions", "page_table") if a.rotary_dim else ("qkv", "positions", "page_table")
    if call.op == "llmc.RotaryPagedAttention" and not a.rotary_dim:
        names = ("qkv", "", "", "positions", "page_table")
    inputs = {name: Operand("input", index) for index, name in enumerate(names) if name}
    kv, q, scratch = Operand("kv"), Operand("temp"), Operand("scratch")
    numbers = a.m * a.head_dim
    append = Launch(
        _kernel(f"append_{_shape(a)}", partial(build_append, a)),
        (*inputs.values(), kv, q, scratch),
        a.m * a.kv_heads,
        numbers * (4 * (a.heads + 2 * a.kv_heads) + a.kv_bytes * (a.heads + 2 * a.kv_heads)),
        numbers * 3 * (a.heads + a.kv_heads),
    )
    context = a.pages * PAGE_TOKENS // 2  # on average
    attend = Launch(
        _kernel(f"attend_{_shape(a)}", partial(build_attend, a, blocks.rows)),
        (q, inputs["positions"], inputs["page_table"], kv, Operand("output", 0), scratch),
        a.kv_heads * -(-a.m // blocks.rows),
        2 * context * a.kv_heads * a.head_dim * a.kv_bytes * -(-a.m // blocks.rows) + 8 * numbers * a.heads,
        4 * context * numbers * a.heads,
    )
    return Implementation(
        launches=(append, attend),
        temps=(4 * a.m * a.heads * a.query_words,),
        scratch_bytes=4 * max(a.head_dim, a.scratch_words(blocks.rows)),
        kv_layer_bytes=a.layer_bytes,
    )


def _shape(a: Attention) -> str:
    dtype = "f32" if a.dot == "fma" else "bf16"
    return f"{dtype}_m{a.m}_h{a.heads}_kh{a.kv_heads}_d{a.head_dim}_rotary{a.rotary_dim}"


def _kernel(name: str, build: partial[Any]) -> Kernel:
    """A kernel whose key is the call of `build`; the name ends with the key's hash."""
    key = f"{build.func.__name__}{build.args}"
    return Kernel(f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:8]}", key, build)


def build_append(attention: Attention) -> Any:
    from llmc.schedules.cpu import attention_append  # TVM is imported only when something is compiled

    return attention_append.append_kernel(attention)


def build_attend(attention: Attention, block: int) -> Any:
    from llmc.schedules.cpu import attention_tiles

    return attention_tiles.attend_kernel(attention, block)


RULES = (Rule("attention", match, implement, space),)

"""Attention over a paged KV cache, with or without rotary positions.

Launches, for a step of M rows from any mix of sequences:
    append: normalise q and k, turn them by their positions, write k and v into the pages
                                                                                (append.py)
            or, over the cache of another layer, what of that queries need
    attend: an online softmax over each row's own pages, 64 tokens at a time    (walk.py);
            on AMX a bf16 cache meets all rows in tiles                         (amx.py)
    merge:  of a small step's splits of the context                             (walk.py)

Small steps (decode) take each row by itself: all query heads of a key head meet its K and V while they are in
registers, and memory is the limit, 4 KH D bytes a token of context in bf16, 2 KH (D + 4) in int8.  Large steps
(prefill) take blocks of rows of one sequence, and arithmetic is the limit, 4 H D operations a token of context and row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from typing import Any

from llmc.compiler.kernel import PAGE_TOKENS, Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.attention_call import attention_sizes, input_places, weight_layouts
from llmc.schedules.cpu.attention.shape import MOST_INT8_DIM, SPLIT_PAGES, Attention
from llmc.schedules.cpu.linear.rule import keyed_kernel
from llmc.schedules.rule import Rule

PREFILL_ROWS = 32
"""Steps of fewer rows are small: one block, if they are one sequence, else row by row."""
QUERY_ROWS = 64
"""Most query rows (rows times heads of a group) of a block: their scores and sums stay in the second level cache."""
TILED_QUERY_ROWS = 128
"""The same where tiles multiply: eight tiles' softmax between their two products, so that neither waits."""
WHOLE_ROWS = 32
"""Rows of a block of a text that is in the step whole."""
MANY_UNITS = 64
"""Rows times key heads that are enough for every thread, so that their splits can stay together."""


@dataclass(frozen=True)
class Blocks:
    """rows: of the step that go through the pages together, where they are one sequence's.  splits: whether the splits
    of a context are units of work too."""

    rows: int
    splits: bool = False

    def __str__(self) -> str:
        rows = f"blocks of {self.rows} rows" if self.rows > 1 else "row by row"
        return f"{rows}, splits of {SPLIT_PAGES * PAGE_TOKENS} tokens" if self.splits else rows


def parse(call: Call, target: Target) -> Attention | None:
    """The attention that a call asks for, or None when it is something else.  Raises LlmcError for heads that these
    kernels cannot take."""
    sizes = attention_sizes(call)
    if sizes is None:
        return None
    kv_dtype, tokens = call.attribute("kv_dtype"), call.attribute("page_tokens", PAGE_TOKENS)
    if tokens != PAGE_TOKENS or sizes["heads"] % sizes["kv_heads"]:
        return None
    if sizes["head_dim"] % 2:
        raise LlmcError(f"attention takes heads of an even number of elements, not {sizes['head_dim']}", place=call.op)
    in_common = gcd(sizes["head_dim"], sizes.get("own_value_dim", 0))
    dots = {"f32": "fma", "bf16": bf16_dot(in_common, target), "int8": "madd16"}
    if kv_dtype not in dots:
        return None
    if kv_dtype == "int8" and sizes["head_dim"] > MOST_INT8_DIM:
        fact = f"a KV cache in int8 takes heads of up to {MOST_INT8_DIM} elements, not {sizes['head_dim']}"
        raise LlmcError(fact, place="--kv-dtype int8", hint="take bf16 or f32")
    places = input_places(call)
    of_heads = {"sinks": "sinks" in places, "alibi": "slopes" in places, "reads_only": "qkv" not in places}
    of_heads |= {"distances": "biases" in places, "ahead": "sees" in places}
    return Attention(m=sizes.pop("rows"), **sizes, dot=dots[kv_dtype], lanes=target.lanes, **of_heads)


def bf16_dot(size: int, target: Target) -> str:
    """How a bf16 cache is multiplied: Attention.dot.  size: divides the elements of keys and of values."""
    if target.has("amx_bf16") and size % 16 == 0:
        return "tiles"
    return "dpbf16" if target.has("avx512_bf16") else "widen"


def match(call: Call, target: Target) -> Blocks | None:
    a = parse(call, target)
    return blocks_of(a, least=4) if a else None


def blocks_of(a: Attention, least: int) -> Blocks:
    """least: rows of a block in large steps."""
    if a.both_ways:
        return Blocks(max(1, min(WHOLE_ROWS, a.m)))
    if a.m < PREFILL_ROWS:
        splits = a.splits > 1 and a.m * a.kv_heads < MANY_UNITS
        return Blocks(a.m if a.m * a.group <= 2 * QUERY_ROWS else 1, splits)
    query_rows = TILED_QUERY_ROWS if a.dot == "tiles" else QUERY_ROWS
    return Blocks(max(least, min(PREFILL_ROWS, query_rows // a.group)))


def space(call: Call, target: Target) -> Iterable[Blocks]:
    """Other blocks worth measuring."""
    a = parse(call, target)
    return space_of(a, (1, 8, 16, 32, 64)) if a else []


def space_of(a: Attention, sizes: tuple[int, ...]) -> list[Blocks]:
    """sizes: of blocks in large steps."""
    if a.both_ways:
        return [Blocks(rows) for rows in sizes if rows <= a.m]
    if a.m < PREFILL_ROWS:
        return [Blocks(rows, splits) for rows in {1, a.m} for splits in {False, a.splits > 1}]
    return [Blocks(rows) for rows in sizes if rows <= a.m]


def implement(call: Call, blocks: Blocks, target: Target) -> Implementation:
    a = parse(call, target)
    assert a is not None, "implement follows match"
    unread = {"k_cache", "v_cache"} | (set() if a.rotary_dim else {"cos", "sin"})
    inputs = {name: Operand("input", at) for name, at in input_places(call).items() if name not in unread}
    kv, q = (Operand("kv"),) * (2 if a.is_int8 else 1), Operand("temp")
    sinks = (inputs.pop("sinks"),) if a.sinks else ()
    slopes = (inputs.pop("slopes"),) if a.alibi else (inputs.pop("biases"),) if a.distances else ()
    rows = (inputs["positions"], *((inputs.pop("sees"),) if a.ahead else ()))
    writes = replace(a, ahead=False)  # so that both ways have their kernels in common; likewise:
    append = turning(a, inputs) if a.reads_only else appending(writes, tuple(inputs.values()), kv)
    reads = replace(a, reads_only=False)
    attend, temps = attending(reads, blocks, (q, *rows, inputs["page_table"], *kv, *slopes), sinks)
    return Implementation(
        launches=(append, *attend),
        temps=(4 * a.query_words * (a.m * a.heads + rows_behind(a, blocks)), *temps),
        scratch_bytes=4 * max(a.longest, a.scratch_words(blocks.rows)),
        kv_layer_bytes=a.layer_bytes,
        layouts=weight_layouts(call),
    )


def rows_behind(a: Attention, blocks: Blocks) -> int:
    """Query rows behind the last one that kernels read."""
    return max(a.rows_beyond(blocks.rows), blocks.rows * a.group if a.both_ways else 0)


def appending(a: Attention, inputs: tuple[Operand, ...], kv: tuple[Operand, ...]) -> Launch:
    """The first launch.  kv: the cache, as often as the kernel takes it."""
    return Launch(
        kernel("append", a, partial(build_append, a)),
        (*inputs, *kv, Operand("temp"), Operand("scratch")),
        a.m * a.kv_heads,
        a.m * (4 * a.columns + 2 * a.heads * a.head_dim + a.kv_bytes * a.kv_heads * (a.head_dim + a.value_dim)),
        a.m * a.head_dim * (3 if a.epsilon is None else 7) * (a.heads + a.kv_heads),
    )


def turning(a: Attention, inputs: dict[str, Operand]) -> Launch:
    """The first launch over a cache that has the step's keys and values."""
    places = ("positions", "page_table")
    return Launch(
        kernel("turn", a, partial(build_turn, a)),
        (*(operand for name, operand in inputs.items() if name not in places), Operand("temp"), Operand("scratch")),
        a.m * a.kv_heads,
        a.m * 6 * a.heads * a.head_dim,
        a.m * a.head_dim * (3 if a.epsilon is None else 7) * a.heads,
    )


def attending(
    a: Attention, blocks: Blocks, reads: tuple[Operand, ...], sinks: tuple[Operand, ...]
) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
    """The launches after the first, and the temporaries between them.  sinks: one operand, or none; for the last."""
    out, states, scratch = Operand("output", 0), Operand("temp", 1), Operand("scratch")
    small = a.m < PREFILL_ROWS and not a.both_ways
    build: partial[Any] = partial(build_attend_whole if a.both_ways else build_attend, a, blocks.rows)
    if small:
        build = partial(build_attend_small, a, blocks.rows, blocks.splits)
    context = a.pages * PAGE_TOKENS // 2  # on average
    passes = a.m if small else -(-a.m // blocks.rows)
    grid = a.kv_heads * passes * (a.splits if blocks.splits else 1)
    n_numbers = a.m * a.heads * (a.head_dim + a.value_dim)
    n_bytes = context * passes * (a.layer_bytes // PAGE_TOKENS) + 4 * n_numbers
    operands = (*reads, *(() if blocks.splits else sinks), states if blocks.splits else out, scratch)
    attend = Launch(kernel("attend", a, build), operands, grid, n_bytes, 2 * context * n_numbers)
    if not blocks.splits:
        return (attend,), ()
    n_bytes = 4 * a.m * a.heads * a.splits * a.state_words
    operands = (*reads[1 : 2 + a.ahead], *sinks, states, out)
    merge = Launch(kernel("merge", a, partial(build_merge, a)), operands, a.m * a.kv_heads, n_bytes)
    return (attend, merge), (n_bytes,)


def kernel(name: str, a: Attention, build: partial[Any]) -> Kernel:
    dtype = {4: "f32", 2: "bf16", 1: "int8"}[a.kv_bytes]
    shape = f"{dtype}_m{a.m}_h{a.heads}_kh{a.kv_heads}_d{a.head_dim}_rotary{a.rotary_dim}"
    return keyed_kernel(f"{name}_{shape}", build)


def build_append(attention: Attention) -> Any:
    from llmc.schedules.cpu.attention import append  # TVM is imported only when something is compiled

    return append.append_kernel(attention)


def build_turn(attention: Attention) -> Any:
    from llmc.schedules.cpu.attention import append

    return append.turn_kernel(attention)


def build_attend(attention: Attention, block: int) -> Any:
    from llmc.schedules.cpu.attention import walk

    return walk.attend_kernel(attention, block)


def build_attend_whole(attention: Attention, block: int) -> Any:
    from llmc.schedules.cpu.attention import whole

    return whole.attend_whole_kernel(attention, block)


def build_attend_small(attention: Attention, block: int, splits: bool) -> Any:
    from llmc.schedules.cpu.attention import walk

    return walk.attend_small_kernel(attention, block, splits)


def build_merge(attention: Attention) -> Any:
    from llmc.schedules.cpu.attention import walk

    return walk.merge_kernel(attention)


RULES = (Rule("attention", match, implement, space),)

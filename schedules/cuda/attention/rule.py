"""Attention over a paged KV cache, with or without rotary positions, norms of queries and keys, and sinks;
or with biases by distance.

Small steps (decode) are one launch: memory is the limit, 4 KH D bytes a token of context in a 2-byte dtype,
2 KH (D + 4) in int8 (include/attention_stream.cuh).  Large steps (prefill) are two, one that turns q and k and writes
k and v into the pages, and one that attends: arithmetic is the limit, 4 H D operations a token of context and row
(include/attention_tile.cuh; on Hopper include/attention_wgmma.cuh).  In float32 all steps are two launches
(include/attention_float32.cuh).  So are steps of any size whose texts are read whole: keys that a row sees are those of
the step itself, which are appended in front (include/attention_texts.cuh).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from llmc.compiler.kernel import (
    DTYPE_BYTES,
    FEW_ROWS,
    PAGE_TOKENS,
    QUERY_ROWS,
    Call,
    Implementation,
    Launch,
    Operand,
)
from llmc.compiler.target import Target
from llmc.schedules.attention_call import weight_layouts
from llmc.schedules.cuda.attention.kernel import (
    APPEND,
    APPEND_CODES,
    APPEND_VECTORS,
    ATTEND_TILE,
    ATTEND_WGMMA,
    FLOAT32_APPEND,
    FLOAT32_ATTEND,
    STREAM,
    Argument,
    apart,
    inputs,
    kernel_of,
)
from llmc.schedules.cuda.attention.shape import SCALE_BYTES, Attention, parse, takes_any
from llmc.schedules.cuda.attention.stream import (
    CHIPS,
    RESERVED_BYTES,
    STREAM_WARPS,
    head_tiles,
    stream_bytes,
    stream_grid,
    stream_of,
    stream_space,
    stream_team,
    unit_queries,
    units,
)
from llmc.schedules.cuda.attention.stream import Stream as Stream
from llmc.schedules.rule import Rule

TILE_ROWS, TILE_THREADS = 64, 128
MOST_WGMMA_DIM = 128
"""Longest head whose queries and sums fit a warpgroup's registers."""
APPEND_ROWS, APPEND_HEADS, APPEND_THREADS = 8, 16, 128
FLOAT32_THREADS = 128


@dataclass(frozen=True)
class Tile:
    """How attention of a large step is cut up.

    stages      pages in a block's shared memory
    groups      warpgroups of a block, of 64 rows each, that multiply by `wgmma`; 0: one of 64 rows, by `mma.sync`
    and for `wgmma` alone:
    pad         by how many tokens more than a page chunks of V lie apart in shared memory, for the tuner to choose
                (with heads of 128 an H200 gained nothing by it)
    in_turn     whether warpgroups ask for products in turn
    blocks      how many at most share the rows and heads"""

    stages: int
    groups: int = 0
    pad: int = 0
    in_turn: bool = True
    blocks: int = 132

    def __str__(self) -> str:
        rows = f"tiles of {TILE_ROWS * max(self.groups, 1)} rows, {self.stages} pages at a time"
        if not self.groups:
            return f"{rows}, mma.sync"
        turns = ", in turn" if self.in_turn and self.groups > 1 else ""
        return f"{rows} padded by {self.pad}, wgmma{turns}, at most {self.blocks} blocks"


@dataclass(frozen=True)
class Float32:
    """The kernels of float32, which have no parameters to choose."""

    def __str__(self) -> str:
        return "a warp for each row and head"


def match(call: Call, target: Target) -> Stream | Tile | Float32 | None:
    a = parse(call)
    if a is None or takes_any(a):
        return None
    if a.kv_dtype == "f32":
        return Float32()
    if a.qkv != "f32" and (a.is_coded or a.rows <= FEW_ROWS or a.epsilon is not None):
        return None  # rounded once more they would give other codes, or in the step's own launch cost accuracy alone
    chip = CHIPS[target.arch]
    if a.rows <= FEW_ROWS and not a.both_ways and (params := stream_of(a, chip, stream_team(a, chip))):
        return params
    if target.level == "sm_90a" and a.head_dim <= MOST_WGMMA_DIM:
        groups = 2 if a.heads * -(-a.rows // (2 * TILE_ROWS)) > chip.processors // 2 else 1
        return Tile(4, groups, blocks=chip.processors)
    return Tile(2 if tile_bytes(a, 2) <= chip.block_bytes - RESERVED_BYTES else 1)


def space(call: Call, target: Target) -> Iterable[Stream | Tile | Float32]:
    """Other splits and tiles worth measuring."""
    best = match(call, target)
    if isinstance(best, Stream):
        a = parse(call)
        assert a is not None, "match has"
        return stream_space(a, CHIPS[target.arch], best)
    if isinstance(best, Tile) and best.groups:
        a = parse(call)
        assert a is not None, "match has"
        most_groups = 3 if a.head_dim <= 64 and not a.is_coded else 2  # more have not the registers
        if is_appended(call):
            most_groups = min(most_groups, QUERY_ROWS // TILE_ROWS)  # nor are queries there for more
        return [
            best,
            replace(best, in_turn=False),
            replace(best, pad=1),
            replace(best, blocks=a.rows * a.heads),  # one for each
            *(replace(best, groups=n) for n in range(1, most_groups + 1) if n != best.groups),
            replace(best, stages=3),
            Tile(2),
        ]
    return []


def implement(call: Call, params: Stream | Tile | Float32, target: Target) -> Implementation:
    a = parse(call)
    assert a is not None, "implement follows match"
    if isinstance(params, Stream):
        launches, temps = streamed(a, params)
    else:
        launches, temps = tiled(a, params) if isinstance(params, Tile) else float32(a)
        if is_appended(call):
            queries = tuple(Operand("input") if each.kind == "temp" else each for each in launches[1].operands)
            launches, temps = (replace(launches[1], operands=queries),), ()
    return Implementation(
        launches=launches,
        temps=temps,
        scratch_bytes=4 * units(a) if isinstance(params, Stream) else 0,
        kv_layer_bytes=a.layer_bytes,
        layouts=weight_layouts(call),
    )


# -- small steps -------------------------------------------------------------------------------------------------------


def streamed(a: Attention, params: Stream) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
    merges = params.splits > 1
    arguments = (*inputs(a), Argument("kv", "Kv", Operand("kv")), Argument("out", "Out", Operand("output")))
    if merges:
        arguments += (
            Argument("partial", "float", Operand("temp")),
            Argument("counters", "uint32_t", Operand("scratch")),
        )
    sizes = {name: getattr(params, name) for name in ("team", "splits", "slots", "least", "resident")}
    sizes |= {"together": params.together} if params.together > 1 else {}
    sizes |= {"ahead": params.ahead} if params.ahead else {}
    shape = a.source(**sizes)
    shared = stream_bytes(a, params.slots, params.team)
    kernel = kernel_of("stream", a, shape, arguments, STREAM, STREAM_WARPS * 32, shared, params.resident)
    states = 4 * units(a) * params.splits * unit_queries(a) * (a.head_dim + 2)
    launch = Launch(
        kernel,
        tuple(argument.operand for argument in arguments),
        stream_grid(a, params.team) * params.splits,
        a.rows * a.context * head_tiles(a) * (a.layer_bytes // PAGE_TOKENS) + in_and_out_bytes(a),
        4 * a.rows * a.context * a.heads * a.head_dim,
    )
    return (launch,), (states,) if merges else ()


# -- large steps -------------------------------------------------------------------------------------------------------


def tile_bytes(a: Attention, stages: int) -> int:
    """Shared memory of a block: K and V of pages; room for codes as what is multiplied; queries too, where registers
    do not hold them."""
    head = PAGE_TOKENS * a.head_dim * a.factor_bytes
    return 2 * stages * PAGE_TOKENS * a.token_bytes + head * (a.is_coded + (a.head_dim > 128))


def ring_bytes(a: Attention, params: Tile) -> int:
    """The same for `wgmma`: K and V as they are multiplied, and of codes their scales."""
    scales = 2 * PAGE_TOKENS * SCALE_BYTES if a.is_coded else 0
    return params.stages * ((2 * PAGE_TOKENS + params.pad) * a.head_dim * a.factor_bytes + scales)


def tiled(a: Attention, params: Tile) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
    tiles = -(-a.rows // (TILE_ROWS * max(params.groups, 1)))
    n_bytes, n_heads = a.factor_bytes, a.heads + 2 * a.kv_heads
    kv, queries = Argument("kv", "Kv", Operand("kv")), Argument("queries", "T", Operand("temp"))
    reads, sees = apart(inputs(a))
    call = APPEND_CODES if a.is_coded else APPEND if a.epsilon is None else APPEND_VECTORS
    append = Launch(
        kernel_of("append", a, a.source(), (*reads, kv, queries), call, APPEND_THREADS, 0),
        tuple(argument.operand for argument in (*reads, kv, queries)),
        -(-a.rows // APPEND_ROWS) * (-(-n_heads // APPEND_HEADS) if call is APPEND else a.kv_heads),
        a.rows * (DTYPE_BYTES[a.qkv] * n_heads + n_bytes * a.heads) * a.head_dim + appended_bytes(a),
        3 * a.rows * (a.heads + a.kv_heads) * a.head_dim,
    )
    arguments = (queries, *sees, kv, Argument("out", "Out", Operand("output")))
    shared_bytes = ring_bytes(a, params) if params.groups else tile_bytes(a, params.stages)
    n_blocks = tiles * a.heads
    if params.groups:
        n_blocks = min(n_blocks, params.blocks)
        fetching = 128 if a.is_coded or params.groups > 1 else 32
        shape = a.source(stages=params.stages, groups=params.groups, pad=params.pad, in_turn=int(params.in_turn))
        kernel_parts = (shape, arguments, ATTEND_WGMMA, 128 * params.groups + fetching)
    else:
        kernel_parts = (a.source(stages=params.stages), arguments, ATTEND_TILE, TILE_THREADS)
    attend = Launch(
        kernel_of("wgmma" if params.groups else "tile", a, *kernel_parts, shared_bytes),
        tuple(argument.operand for argument in arguments),
        n_blocks,
        a.context * (a.layer_bytes // PAGE_TOKENS) + (n_bytes + DTYPE_BYTES[a.out]) * a.rows * a.heads * a.head_dim,
        4 * a.rows * a.context * a.heads * a.head_dim,
    )
    return (append, attend), (n_bytes * tiles * max(params.groups, 1) * TILE_ROWS * a.heads * a.head_dim,)


def is_appended(call: Call) -> bool:
    """Whether the product in front has turned the queries and appended: the second launch alone is left."""
    return call.op == "llmc.AppendedAttention"


# -- float32 -----------------------------------------------------------------------------------------------------------


def float32(a: Attention) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
    kv, queries = Argument("kv", "Kv", Operand("kv")), Argument("queries", "T", Operand("temp"))
    reads, sees = apart(inputs(a))
    arguments = (queries, *sees, kv, Argument("out", "Out", Operand("output")))
    append = Launch(
        kernel_of("append", a, a.source(), (*reads, kv, queries), FLOAT32_APPEND, FLOAT32_THREADS, 0),
        tuple(argument.operand for argument in (*reads, kv, queries)),
        a.rows,
        8 * a.rows * (a.heads + 2 * a.kv_heads) * a.head_dim,
        3 * a.rows * (a.heads + a.kv_heads) * a.head_dim,
    )
    attend = Launch(
        kernel_of("float32", a, a.source(), arguments, FLOAT32_ATTEND, FLOAT32_THREADS, 0),
        tuple(argument.operand for argument in arguments),
        -(-a.rows * a.heads * 32 // FLOAT32_THREADS),
        a.rows * a.context * (a.layer_bytes // PAGE_TOKENS) + (4 + DTYPE_BYTES[a.out]) * a.rows * a.heads * a.head_dim,
        4 * a.rows * a.context * a.heads * a.head_dim,
    )
    return (append, attend), (4 * a.rows * a.heads * a.head_dim,)


# -- what memory must give and take ------------------------------------------------------------------------------------


def in_and_out_bytes(a: Attention) -> int:
    """What a step brings and takes away."""
    columns = DTYPE_BYTES[a.qkv] * (a.heads + 2 * a.kv_heads) + DTYPE_BYTES[a.out] * a.heads
    return a.rows * columns * a.head_dim + appended_bytes(a)


def appended_bytes(a: Attention) -> int:
    """What a step adds to the cache."""
    return a.rows * (a.layer_bytes // PAGE_TOKENS)


RULES = (Rule("attention", match, implement, space),)

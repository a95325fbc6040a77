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
from llmc.schedules.cuda.attention_kernel import (
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
from llmc.schedules.cuda.attention_shape import KV_BYTES, SCALE_BYTES, Attention, parse, takes_any
from llmc.schedules.rule import Rule

STREAM_BLOCKS, CODED_STREAM_BLOCKS, MOST_STREAM_BLOCKS = 2, 3, 4
"""Blocks of a small step that share a multiprocessor; the second over an int8 cache, whose codes take more instructions
for fewer bytes: more warps; the third at most, so that many units are under way at once and not in rounds."""
STREAM_WARPS = 4
TOKENS = 16
"""Of a page, for one warp at a time."""
MOST_SLOTS = 8
LEAST_PAGES = 4
"""Of a split: on paper to merge two takes about as long as to attend so many, which have come before queries are
there."""
BESIDE_BYTES, BESIDE_BLOCKS = 56 << 10, 3
"""What the product in front leaves of a multiprocessor on Hopper where its weights are codes: of shared memory (q, k
and v of one token take 167 to 172 KB of 228), and of registers as many as one of three blocks has.  A block that finds
room beside one of that product's begins, and asks for its pages, while that one still multiplies."""
EARLY_PAGES = 2
"""Of a context, asked for before queries are there by a block that begins so early: what finds no room goes to L2."""
LEAST_SLOT_BYTES = 4
"""Of all slots together, for each element of a token: what the sums of a block take, in float32."""
TILE_ROWS, TILE_THREADS = 64, 128
MOST_WGMMA_DIM = 128
"""Longest head whose queries and sums fit a warpgroup's registers."""
APPEND_ROWS, APPEND_HEADS, APPEND_THREADS = 8, 16, 128
FLOAT32_THREADS = 128


@dataclass(frozen=True)
class Chip:
    """processors: multiprocessors.  shared_bytes: shared memory of one; block_bytes: most that a block may have."""

    processors: int
    shared_bytes: int
    block_bytes: int


CHIPS = {
    80: Chip(108, 164 << 10, 163 << 10),
    89: Chip(128, 100 << 10, 99 << 10),
    90: Chip(132, 228 << 10, 227 << 10),
    100: Chip(148, 228 << 10, 227 << 10),
    120: Chip(170, 100 << 10, 99 << 10),
}
RESERVED_BYTES = 2432
"""Of shared memory, in each block: the driver's, and variables of fixed size."""


@dataclass(frozen=True)
class Stream:
    """splits: teams that may share a row's context, `least` pages or more each.  slots: copies of K or V in a warp's
    shared memory.  resident: blocks that share a multiprocessor.  team: warps of a block that share a split.
    together: times 16 tokens that a warp takes at once.  ahead: copies beyond the slots that are asked for, to L2,
    before queries are there."""

    splits: int
    slots: int
    least: int = LEAST_PAGES
    resident: int = STREAM_BLOCKS
    team: int = STREAM_WARPS
    together: int = 1
    ahead: int = 0

    def __str__(self) -> str:
        splits = f"at most {self.splits} splits of at least {self.least} pages"
        blocks = f"{self.resident} blocks a multiprocessor, teams of {self.team}"
        tokens = f", {TOKENS * self.together} tokens at a time" if self.together > 1 else ""
        return f"{splits}, {self.slots}{f'+{self.ahead}' if self.ahead else ''} copies ahead, {blocks}{tokens}"


@dataclass(frozen=True)
class Tile:
    """stages: pages in a block's shared memory.  groups: warpgroups of 64 rows of a block that multiply by `wgmma`;
    0: one of 64 rows by `mma.sync`.  Of `wgmma`: pad, tokens that chunks of V in shared memory are more than a page
    apart, for the tuner to choose (with heads of 128 an H200 gained nothing by it); in_turn, whether warpgroups ask for
    products in turn; blocks, how many at most share the rows and heads."""

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
    """Nothing to choose."""

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
        chip = CHIPS[target.arch]
        others = [stream_of(a, chip, best.team, resident) for resident in (4, 3, 2)]
        others += [stream_of(a, chip, team) for team in (4, 2, 1) if team in (best.team * 2, best.team // 2)]
        splits = sorted({1, 2, 4, 8, 16, best.splits})
        shared = [replace(best, splits=n, least=least) for least in (LEAST_PAGES, 2, 1) for n in splits]
        candidates = [
            *beside_product(a, chip),
            *at_once(a, best),
            *(each for each in others if each),
            *(each for each in shared if each.splits > 1 or each.least > 2),
        ]
        return list(dict.fromkeys(candidates))
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


def head_tiles(a: Attention) -> int:
    """Passes over a key head's pages: 16 query heads at most go together."""
    return -(-a.group // 16)


def units(a: Attention) -> int:
    return a.rows * a.kv_heads * head_tiles(a)


def unit_queries(a: Attention) -> int:
    """Rows of the product that a unit has at most: query heads of one or more rows of the step."""
    return 16 if a.group > 16 else min(a.rows, 16 // a.group) * a.group


def stream_team(a: Attention, chip: Chip) -> int:
    """As many warps for each unit as let two blocks a multiprocessor take all units at once."""
    at_once = STREAM_BLOCKS * chip.processors
    return next((team for team in (4, 2) if stream_grid(a, team) <= at_once), 1)


def stream_grid(a: Attention, team: int) -> int:
    """Blocks for each split."""
    return -(-units(a) * team // STREAM_WARPS)


def stream_blocks(a: Attention, chip: Chip, team: int) -> int:
    if a.head_dim > 128:  # registers: 168 a thread for three blocks, 128 for four
        return STREAM_BLOCKS
    least = CODED_STREAM_BLOCKS if a.is_coded else STREAM_BLOCKS
    return max(least, min(-(-stream_grid(a, team) // chip.processors), MOST_STREAM_BLOCKS))


def stream_of(a: Attention, chip: Chip, team: int, resident: int = 0) -> Stream | None:
    """With as many slots as let so many blocks share a multiprocessor (0: as many as there is work for), fewer blocks
    if there is no room for them; None where there is none for one, in whose slots warps' sums must find room."""
    least = LEAST_SLOT_BYTES // KV_BYTES[a.kv_dtype]
    if stream_bytes(a, least, team) > chip.block_bytes - RESERVED_BYTES:
        return stream_of(a, chip, 4, resident) if team < 4 else None
    resident = resident or stream_blocks(a, chip, team)
    resident = max(1, min(resident, chip.shared_bytes // (stream_bytes(a, least, team) + RESERVED_BYTES)))
    share = chip.shared_bytes // resident - RESERVED_BYTES
    slots = next((n for n in range(MOST_SLOTS, least, -1) if stream_bytes(a, n, team) <= share), least)
    splits = min(resident * chip.processors // stream_grid(a, team), a.pages // LEAST_PAGES)
    return Stream(max(1, splits), slots, resident=resident, team=team)


def beside_product(a: Attention, chip: Chip) -> list[Stream]:
    """Blocks that find room beside those of the product in front, one a multiprocessor, where all units do so."""
    grid, copied = stream_grid(a, STREAM_WARPS), a.token_bytes * PAGE_TOKENS
    slots = (BESIDE_BYTES - RESERVED_BYTES - stream_bytes(a, 0, STREAM_WARPS)) // copied
    if grid > chip.processors or slots < max(2, LEAST_SLOT_BYTES // KV_BYTES[a.kv_dtype]):
        return []
    slots = min(slots, MOST_SLOTS)
    splits = max(1, min(chip.processors // grid, a.pages // LEAST_PAGES))
    ahead = max(0, 2 * EARLY_PAGES * PAGE_TOKENS // (STREAM_WARPS * TOKENS) - slots)
    plain = Stream(splits, slots, resident=BESIDE_BLOCKS, ahead=ahead)
    return [*at_once(a, plain), plain]


def at_once(a: Attention, params: Stream) -> list[Stream]:
    """The same, but a warp takes 32 tokens at a time: it waits half as often for scores, and for the largest of them.
    Where it has registers for that."""
    most = 2 if a.rows > 1 else 3
    fits = not a.is_coded and a.head_dim <= 128 and params.resident <= most and params.slots > 1
    return [replace(params, together=2)] if fits else []


def stream_bytes(a: Attention, slots: int, team: int) -> int:
    """Shared memory of a block: copies of K or V; for each team queries, and keys and values of 16 rows of the step, or
    a row's own in float32: of the step's only row, and where a warp alone puts those of 16 where copies were."""
    new = 2 * (16 * a.token_bytes if team > 1 and a.rows > 1 else 4 * a.head_dim)
    return a.token_bytes * PAGE_TOKENS * slots + STREAM_WARPS // team * (new + 16 * a.head_dim * a.factor_bytes)


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

"""Multi-head latent attention over pages of latents on a GPU, by mma.sync: include/latent.cuh, latent_attend.cuh.

Launches, for a step of M rows from any mix of sequences:
    append   normalise each row's latent, turn what belongs behind it, write both into its page; put queries together
    attend   tiles of up to 64 rows of a product against the pages, of a small step split over the context
    merge    of a small step, the splits of a context

All heads of a token share one key, L + RD numbers in the cache, whose first L are the value.  Bytes: 2 (L + RD) a token
of context and row; operations: 2 H (2 L + RD).  Few heads are bound by memory, 128 by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from llmc.compiler.kernel import (
    DTYPE_BYTES,
    FEW_ROWS,
    PAGE_TOKENS,
    Call,
    Implementation,
    Kernel,
    Launch,
    Operand,
    RowMajor,
    short_hash,
)
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.attention_call import LATENT, LATENT_INPUTS
from llmc.schedules.cuda.attention.shape import literal
from llmc.schedules.cuda.attention.stream import CHIPS, RESERVED_BYTES, Chip
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.rule import Rule

*INPUTS, _, _ = LATENT_INPUTS
"""What kernels read of the call's inputs, all but both caches."""
FLOATS = INPUTS[: INPUTS.index("positions")]
KV_DTYPES = ("bf16", "f16")
MOST_LATENT = 512
"""Longest latent whose sums for 64 rows fit the registers of eight warps."""
ATTEND_THREADS, OTHER_WARPS = 256, 4
LEAST_PAGES = 2
"""The fewest pages of a split: what it gathers for 64 rows is as large as 1.8 pages, is written once and read once."""


@dataclass(frozen=True)
class LatentAttention:
    """M = rows rows of `heads` heads over up to `pages` pages each of latents of `latent_dim` elements, behind which
    rotary_dim are turned.  query_dim: elements of a head of q.  out: the result's dtype; tiled: whether it lies in
    tiles.  page_bytes: of a page whose layers differ in size; 0: they are all like this one."""

    rows: int
    pages: int
    heads: int
    latent_dim: int
    rotary_dim: int
    query_dim: int
    interleaved: bool
    epsilon: float
    scale: float
    softcap: float
    window: int
    n_layers: int
    kv_dtype: str
    out: str
    tiled: bool
    page_bytes: int = 0

    @property
    def key_dim(self) -> int:
        return self.latent_dim + self.rotary_dim

    @property
    def layer_bytes(self) -> int:
        """Bytes of a page, for one layer."""
        return 2 * PAGE_TOKENS * self.key_dim

    @property
    def context(self) -> int:
        """Tokens that a row attends on average."""
        return self.pages * PAGE_TOKENS // 2

    def head_tiles(self, rows: int) -> int:
        """Tiles of so many rows of a product that the heads of one row of the step take."""
        return -(-self.heads // rows)


@dataclass(frozen=True)
class Tile:
    """rows: of a product, 16, 32 or 64.  tokens: rows of the step in a tile.  stages: pages in shared memory.
    splits: blocks that may share a row's context, `least` pages or more each."""

    rows: int
    tokens: int
    stages: int
    splits: int = 1
    least: int = LEAST_PAGES

    def __str__(self) -> str:
        tiles = f"tiles of {self.rows} rows, {self.tokens} tokens, {self.stages} pages at a time"
        return f"{tiles}, at most {self.splits} splits of at least {self.least} pages"


def parse(call: Call) -> LatentAttention | None:
    """The attention that a call asks for, or None.  Raises LlmcError for one that these kernels cannot do."""
    if call.op != LATENT:
        return None
    page_table, kv_dtype, out = call.inputs[INPUTS.index("page_table")], call.attribute("kv_dtype"), call.outputs[0]
    latent_dim, rotary_dim = call.attribute("latent_dim"), call.attribute("rotary_dim")
    assert page_table is not None, "its definition asks for one"
    if kv_dtype not in KV_DTYPES:
        fact = f"latent attention on NVIDIA GPUs keeps its cache in bf16 or f16, not {kv_dtype}"
        raise LlmcError(fact, place="--kv-dtype", hint="--dtype bf16 --kv-dtype bf16, or --target cpu")
    if latent_dim % 16 or rotary_dim % 16 or latent_dim > MOST_LATENT or call.attribute("head_dim") % 4:
        fact = f"latent attention on NVIDIA GPUs takes latents of 16, 32 … {MOST_LATENT} elements, not {latent_dim}"
        said = f"{fact}, and turned parts of 16, 32 …, not {rotary_dim}"
        raise LlmcError(said, place=call.op, hint="compile for a CPU target")
    return LatentAttention(
        rows=page_table.shape[0],
        pages=page_table.shape[1],
        heads=call.attribute("num_heads"),
        latent_dim=latent_dim,
        rotary_dim=rotary_dim,
        query_dim=call.attribute("head_dim"),
        interleaved=bool(call.attribute("interleaved")),
        epsilon=float(call.attribute("epsilon")),
        scale=float(call.attribute("scale")),
        softcap=float(call.attribute("softcap")),
        window=call.attribute("window"),
        n_layers=call.attribute("n_layers"),
        page_bytes=call.attribute("page_bytes", 0),
        kv_dtype=kv_dtype,
        out=out.dtype,
        tiled=out.tiled,
    )


def match(call: Call, target: Target) -> Tile | None:
    a = parse(call)
    return tile_of(a, CHIPS[target.arch], 64) if a else None


def tile_of(a: LatentAttention, chip: Chip, most_rows: int) -> Tile:
    """Tiles as high as there are queries for, at most so high, and as shared memory has room for."""
    small = a.rows <= FEW_ROWS
    wanted = min(a.heads if small else 64, most_rows)
    heights = [n for n in (64, 32, 16) if n < 2 * wanted or n == 16]
    room = chip.block_bytes - RESERVED_BYTES
    for height in heights:
        stages = next((n for n in (2, 1) if shared_bytes(a, height, n) <= room), 0)
        if stages:
            break
    else:
        fact = f"keys of {a.key_dim} elements find no room in the {chip.block_bytes >> 10} KB that a block has"
        raise LlmcError(fact, place="latent attention", hint="compile for a CPU target")
    tokens = 1 if small else max(1, height // a.heads)
    blocks = -(-a.rows // tokens) * a.head_tiles(height)
    return Tile(height, tokens, stages, splits_of(a, chip, blocks, LEAST_PAGES) if small else 1)


def splits_of(a: LatentAttention, chip: Chip, blocks: int, least: int) -> int:
    """As many splits as let all blocks run at once, one a multiprocessor, with `least` pages each."""
    return max(1, min(chip.processors // blocks, a.pages // least))


def shared_bytes(a: LatentAttention, height: int, stages: int) -> int:
    """Shared memory of a block: queries, pages, weights of a page's tokens."""
    return 2 * (height * a.key_dim + stages * PAGE_TOKENS * a.key_dim + PAGE_TOKENS * height)


def space(call: Call, target: Target) -> Iterable[Tile]:
    """Other tiles and splits worth measuring."""
    a = parse(call)
    if a is None:
        return []
    chip = CHIPS[target.arch]
    best = tile_of(a, chip, 64)
    others = [best]
    if a.rows <= FEW_ROWS:
        blocks = a.rows * a.head_tiles(best.rows)
        others += [replace(best, splits=splits_of(a, chip, blocks, least), least=least) for least in (4, 1, 8)]
    others += [tile_of(a, chip, rows) for rows in (32, 16)]
    others += [replace(best, stages=1)] if best.stages > 1 else []
    others += [replace(best, splits=n) for n in (best.splits // 2, 2 * best.splits) if n and best.splits > 1]
    return list(dict.fromkeys(others))


def implement(call: Call, tile: Tile, target: Target) -> Implementation:
    a = parse(call)
    assert a is not None, "implement follows match"
    tiles = -(-a.rows // tile.tokens) * a.head_tiles(tile.rows)
    operands = {name: Operand("input", at) for at, name in enumerate(INPUTS)}
    operands |= {"cache": Operand("kv"), "out": Operand("output")}
    operands |= {"queries": Operand("temp", 0), "partial": Operand("temp", 1)}
    per_row, merges, out_bytes = a.rows * a.heads, tile.splits > 1, DTYPE_BYTES[a.out]

    def launch(part: str, names: Sequence[str], grid: int, n_bytes: int, n_operations: int) -> Launch:
        made = kernel(part, a, tile, names)
        return Launch(made, tuple(operands[name] for name in names), grid, n_bytes, n_operations)

    launches = [
        launch(
            "append",
            (*INPUTS, "cache", "queries"),
            -(-a.rows * (a.heads + 1) // OTHER_WARPS),
            (4 + 2) * (per_row + a.rows) * a.key_dim,
            3 * per_row * a.rotary_dim,
        ),
        launch(
            "attend",
            ("queries", "positions", "page_table", "cache", "out", *(("partial",) if merges else ())),
            tiles * tile.splits,
            a.rows * a.context * 2 * a.key_dim + per_row * (2 * a.key_dim + out_bytes * a.latent_dim),
            2 * per_row * a.context * (a.key_dim + a.latent_dim),
        ),
    ]
    temps = [2 * tiles * tile.rows * a.key_dim]
    if merges:
        n_bytes, n_operations = 4 * per_row * a.latent_dim * (tile.splits + 1), 2 * per_row * a.latent_dim * tile.splits
        launches.append(launch("merge", ("positions", "partial", "out"), per_row, n_bytes, n_operations))
        temps.append(4 * tiles * tile.splits * tile.rows * (a.latent_dim + 2))
    layouts = {INPUTS.index("norm"): RowMajor("f32")}
    return Implementation(tuple(launches), tuple(temps), kv_layer_bytes=a.layer_bytes, layouts=layouts)


def kernel(part: str, a: LatentAttention, tile: Tile, arguments: Sequence[str]) -> Kernel:
    """A kernel that is one call of include/latent_….cuh."""
    attends = part == "attend"
    n_threads = ATTEND_THREADS if attends else 32 * OTHER_WARPS
    types = dict.fromkeys(FLOATS, "const float") | dict.fromkeys(("positions", "page_table"), "const int")
    types |= {"cache": C_TYPES[a.kv_dtype], "queries": C_TYPES[a.kv_dtype], "out": C_TYPES[a.out], "partial": "float"}
    if attends:
        types |= {name: f"const {types[name]}" for name in ("cache", "queries")}
    passed = [*arguments, *(["nullptr"] if attends and "partial" not in arguments else [])]
    source = (
        f'#include "{"latent_attend" if attends else "latent"}.cuh"\n\n{shape_source(a, tile)}\n\n'
        f'extern "C" __global__ void __launch_bounds__({n_threads}) '
        f"KERNEL({', '.join(f'{types[name]} *{name}' for name in arguments)}) {{\n"
        f"    latent_{part}<Shape>({', '.join(passed)});\n}}\n"
    )
    name = f"latent_{part}_{a.kv_dtype}_m{a.rows}_h{a.heads}_l{a.latent_dim}_{short_hash(source)}"
    text = source.replace("KERNEL", name)
    shared = shared_bytes(a, tile.rows, tile.stages) if attends else 0
    return Kernel(name, text, partial(str, text), n_threads=n_threads, shared_bytes=shared, dependent=True)


def shape_source(a: LatentAttention, tile: Tile) -> str:
    """`struct Shape` of include/latent.cuh."""
    element = C_TYPES[a.kv_dtype]
    types = {"T": element, "Kv": element, "Out": C_TYPES[a.out]}
    numbers = {"rows": a.rows, "pages": a.pages, "heads": a.heads, "kv_heads": 1, "head_dim": a.latent_dim}
    numbers |= {"rotary_dim": a.rotary_dim, "query_dim": a.query_dim, "window": a.window}
    numbers |= {"tile_rows": tile.rows, "tile_tokens": tile.tokens, "stages": tile.stages}
    numbers |= {"splits": tile.splits, "least": tile.least}
    floats = {"scale": a.scale, "softcap": a.softcap, "epsilon": a.epsilon}
    members = [f"using {name} = {kind};" for name, kind in types.items()]
    members += [f"static constexpr int {name} = {number};" for name, number in numbers.items()]
    members += [f"static constexpr float {name} = {literal(number)};" for name, number in floats.items()]
    members += [f"static constexpr bool {name} = {literal(getattr(a, name))};" for name in ("interleaved", "tiled")]
    members.append(f"static constexpr int64_t page_elements = {(a.page_bytes or a.n_layers * a.layer_bytes) // 2};")
    return "\n".join(["struct Shape {", *(f"    {member}" for member in members), "};"])


RULES = (Rule("latent_attention", match, implement, space),)

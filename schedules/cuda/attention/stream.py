"""How attention of small steps is cut up: teams of warps, splits of a context, and how much of it is on its way.

The kernels: include/attention_stream.cuh.  What is measured against the rule's own choice is mostly about which blocks
find room on a multiprocessor together, those of the products in front and behind among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cuda.attention.shape import KV_BYTES, Attention

STREAM_BLOCKS, CODED_STREAM_BLOCKS, MOST_STREAM_BLOCKS = 2, 3, 4
"""How many blocks of a small step share a multiprocessor; over an int8 cache, whose codes take more instructions for
fewer bytes and so want more warps; and at most, so that many units are under way at once and not in rounds."""
STREAM_WARPS = 4
TOKENS = 16
"""Tokens of a page that a warp takes at a time."""
MOST_SLOTS = 8
LEAST_PAGES = 4
"""The fewest pages of a split: on paper merging two splits takes as long as attending so many pages, which have arrived
before the queries are there."""
BESIDE_BYTES, BESIDE_BLOCKS = 56 << 10, 3
"""What the product in front leaves free of a multiprocessor on Hopper, if its weights are codes: shared memory (for q,
k and v of one token it takes 167 to 172 KB of 228), and registers for a block when three share a multiprocessor.  A
block of attention that finds room beside one of that product begins, and asks for its pages, while that one still
multiplies."""
EARLY_COPIES = 4
"""Copies of K or V that a block which begins so early asks for before queries are there: all that a team's warp has of
two pages (what finds no room goes to L2).  They are also enough where memory is the limit."""
LEAST_SLOT_BYTES = 4
"""The least size of all slots together, for each element of a token: the sums of a block must fit there, in float32."""


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
"""Shared memory of each block that the driver takes, and variables of fixed size."""


@dataclass(frozen=True)
class Stream:
    """How attention of a small step is cut up.

    splits      teams that may share a row's context, each with `least` pages or more
    slots       copies of K or V in a warp's shared memory
    resident    blocks that share a multiprocessor
    team        warps of a block that share a split
    together    times 16 tokens that a warp takes at once
    ahead       copies beyond the slots that are asked for, to L2, before queries are there
    """

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


# -- units, and how they are shared out --------------------------------------------------------------------------------


def head_tiles(a: Attention) -> int:
    """Passes over a key head's pages: 16 query heads at most go together."""
    return -(-a.group // 16)


def units(a: Attention) -> int:
    return a.rows * a.kv_heads * head_tiles(a)


def unit_queries(a: Attention) -> int:
    """Rows of the product that a unit has at most: query heads of one or more rows of the step."""
    return 16 if a.group > 16 else min(a.rows, 16 // a.group) * a.group


def stream_team(a: Attention, chip: Chip) -> int:
    """Warps for each unit, as many as let two blocks a multiprocessor take all units at once."""
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


def stream_space(a: Attention, chip: Chip, best: Stream) -> list[Stream]:
    """Other ways worth measuring; best: the rule's own choice."""
    others = [stream_of(a, chip, best.team, resident) for resident in (4, 3, 2)]
    others += [stream_of(a, chip, team) for team in (4, 2, 1) if team in (best.team * 2, best.team // 2)]
    splits = sorted({1, 2, 4, 8, 16, best.splits})
    shared = [replace(best, splits=n, least=least) for least in (LEAST_PAGES, 2, 1) for n in splits]
    candidates = [
        *beside_product(a, chip),
        *leaving_room(a, chip, best),
        *at_once(a, best),
        *(each for each in others if each),
        *(each for each in shared if each.splits > 1 or each.least > 2),
    ]
    return list(dict.fromkeys(candidates))


def beside_product(a: Attention, chip: Chip) -> list[Stream]:
    """Blocks that find room beside those of the product in front, one a multiprocessor, where all units do so."""
    grid, copied = stream_grid(a, STREAM_WARPS), a.token_bytes * PAGE_TOKENS
    slots = (BESIDE_BYTES - RESERVED_BYTES - stream_bytes(a, 0, STREAM_WARPS)) // copied
    if grid > chip.processors or slots < max(2, LEAST_SLOT_BYTES // KV_BYTES[a.kv_dtype]):
        return []
    slots = min(slots, MOST_SLOTS)
    splits = max(1, min(chip.processors // grid, a.pages // LEAST_PAGES))
    ahead = max(0, EARLY_COPIES - slots)
    plain = Stream(splits, slots, resident=BESIDE_BLOCKS, ahead=ahead)
    return [*at_once(a, plain), plain]


def leaving_room(a: Attention, chip: Chip, params: Stream) -> list[Stream]:
    """Where units are two for each multiprocessor: blocks beside two of which one of the next product finds room (of 71
    KB and 28 thousand registers in int4 at 8 tokens), so that its weights come behind the last pages."""
    grid = stream_grid(a, STREAM_WARPS)
    are_two = params.team == STREAM_WARPS and chip.processors < grid <= 2 * chip.processors and not a.is_coded
    if not are_two or params.slots <= EARLY_COPIES:
        return []
    return [replace(params, slots=EARLY_COPIES, resident=MOST_STREAM_BLOCKS)]


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

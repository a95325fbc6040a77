"""What the kernels of paged attention agree on: the sizes, the bytes of a page, and how two numbers multiply."""

from __future__ import annotations

from dataclasses import dataclass, fields

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.amx import ROWS

SPLIT_PAGES = 8
"""Pages of a split.  A row's context is summed up split by split and the splits are merged in order, whoever did them:
the same bits on one thread and on many.  512 tokens: the merge is one of 8 pages' work in a hundred."""
SPREAD_COLUMNS = 256
"""Most columns of values that are spread out at a time."""
MOST_INT16 = 32767.0
MOST_INT8_DIM = 512
"""Products of int16 and int8 that a sum in int32 holds: 512 * 32767 * 127 < 2**31."""
RARE = ("own_value_dim", "norms_values", "page_bytes", "reads_only", "both_ways", "distances", "ahead")
"""Fields that few models set."""


@dataclass(frozen=True, repr=False)
class Attention:
    """M rows of H query heads and KH key and value heads of D elements; G = H / KH query heads share one of each.

    rotary_dim      elements of a head that rotary turns; 0: none
    n_layers        layers whose parts make up a page
    window          how many keys a row sees; negative: those of its own chunk of so many; 0: all
    epsilon         of the norm of each query and key; None: they are not normalised
    sinks           whether each head has one more score, which no key has
    alibi           whether slope times distance is added to scores
    own_value_dim   elements of a value; 0: D
    norms_values    whether values are normalised too
    page_bytes      of a page whose layers differ in size; 0: all layers are like this one
    reads_only      whether another call has appended the step's keys and values
    both_ways       whether rows see all of their text, which is in the step whole, or the keys less than `window` away
    distances       whether a number that is looked up by distance is added to scores: each head has 2 `reach` of them,
                    that of distance 0 in the middle
    ahead           whether a row sees what is behind it up to a position that it is told
    dot             how numbers are multiplied: "fma" in float32; "dpbf16" as pairs of bf16; "tiles" as pairs too, in
                    AMX's tile registers; "widen" as bf16 widened to float32; "madd16" the cache's int8 with queries and
                    probabilities in int16, summed in int32

    A page's part for one layer is KH heads: K, V and, for int8, scales.  In words of E elements (float32: E = 1; bf16
    and int8: E = 2):
        K [64/16][D/E][16]      word (t/16, d/E, t%16) holds elements d … d+E-1 of token t
        V [64/E][D']            word (t/E, d) holds element d of tokens t … t+E-1    (D': a value's, rounded up to 16)
        scales [2][64]          float32: what an int8 of token t's key, and of its value, counts
    """

    m: int
    pages: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool
    scale: float
    softcap: float
    window: int
    n_layers: int
    dot: str
    lanes: int
    epsilon: float | None = None
    sinks: bool = False
    alibi: bool = False
    own_value_dim: int = 0
    norms_values: bool = False
    page_bytes: int = 0
    reads_only: bool = False
    both_ways: bool = False
    distances: bool = False
    ahead: bool = False

    def __repr__(self) -> str:
        """What kernels are told apart by: all fields, but for rare ones that are not set."""
        shown = [field.name for field in fields(self) if field.name not in RARE or getattr(self, field.name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def chunk(self) -> int:
        """Tokens of a chunk that a row does not see beyond; 0: there are none."""
        return max(-self.window, 0)

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence, in whole pages."""
        return self.pages * PAGE_TOKENS

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return self.own_value_dim or self.head_dim

    @property
    def longest(self) -> int:
        """Elements of a key or a value, whichever has more."""
        return max(self.head_dim, self.value_dim)

    @property
    def columns(self) -> int:
        """Columns of a row of queries, keys and values."""
        return (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim

    @property
    def most_query(self) -> float:
        """What a query's largest element becomes in int16, at most, so that the sum of its products fits int32."""
        return MOST_INT16 if self.head_dim <= MOST_INT8_DIM else MOST_INT16 // 2

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def is_int8(self) -> bool:
        return self.dot == "madd16"

    @property
    def kv_bytes(self) -> int:
        """Bytes of one cached number."""
        return {"fma": 4, "madd16": 1}.get(self.dot, 2)

    @property
    def per_word(self) -> int:
        return 1 if self.dot == "fma" else 2

    @property
    def word_bytes(self) -> int:
        return self.kv_bytes * self.per_word

    @property
    def word_type(self) -> str:
        """A word of the cache, as it is read."""
        return {"fma": "float32", "madd16": "int16"}.get(self.dot, "int32")

    @property
    def padded_dim(self) -> int:
        return -(-self.value_dim // 16) * 16

    @property
    def key_words(self) -> int:
        """Words of K in one page and head."""
        return PAGE_TOKENS * self.head_dim // self.per_word

    @property
    def spreads(self) -> bool:
        """Whether a page has no V: values are the first part of keys (LatentAttention)."""
        return False

    @property
    def scales_at(self) -> int:
        """Words of K and V in one page and head: where the scales begin."""
        return self.key_words + (0 if self.spreads else PAGE_TOKENS * self.padded_dim // self.per_word)

    @property
    def head_words(self) -> int:
        return self.scales_at + (2 * PAGE_TOKENS * 4 // self.word_bytes if self.is_int8 else 0)

    @property
    def layer_bytes(self) -> int:
        return self.word_bytes * self.kv_heads * self.head_words

    @property
    def page_words(self) -> int:
        return (self.page_bytes or self.n_layers * self.layer_bytes) // self.word_bytes

    @property
    def splits(self) -> int:
        """Splits of the longest sequence."""
        return -(-self.pages // SPLIT_PAGES)

    @property
    def left_per_word(self) -> int:
        """Words of the left operand (a query, a probability) that meet one word of the cache."""
        return 2 if self.dot == "widen" else 1

    @property
    def query_words(self) -> int:
        """Words of one query head as the first kernel leaves it: float32, pairs of bf16, or pairs of int16 and then
        the float32 that they are multiples of."""
        return self.head_dim // self.per_word * self.left_per_word + self.is_int8

    @property
    def query_type(self) -> str:
        return "int32" if self.dot in ("dpbf16", "tiles", "madd16") else "float32"

    @property
    def state_words(self) -> int:
        """float32 of what a query row has gathered: m, l (a vector each) and O."""
        return 2 * self.lanes + self.padded_dim

    def scratch_words(self, block: int) -> int:
        """float32 of a thread's own memory: for each query row of a block S, P, what scales O and P V, two states; for
        tiles half a page of values; columns of values that are spread out."""
        values = PAGE_TOKENS // 4 * self.padded_dim if self.dot == "tiles" else 0
        values = PAGE_TOKENS // self.per_word * SPREAD_COLUMNS if self.spreads else values
        return self.room(block) * (2 * PAGE_TOKENS + 2 * self.lanes + 2 * self.state_words) + values

    def tile_rows(self, block: int) -> int:
        """Query rows of each tile of a block: as many in each."""
        rows = block * self.group
        return -(-rows // -(-rows // ROWS))

    def room(self, block: int) -> int:
        """Query rows that a block has memory for: whole tiles of them where tiles multiply."""
        rows = block * self.group
        return -(-rows // ROWS) * self.tile_rows(block) if self.dot == "tiles" else rows

    def rows_beyond(self, block: int) -> int:
        """Query rows that tiles read past the last one."""
        return max(self.room(n) - n * self.group for n in (1, block))

    @property
    def tile_pairs(self) -> int:
        """Pairs of elements of D that a product of tiles adds up; D is a multiple of them."""
        return 16 if self.head_dim % 32 == 0 else 8


@dataclass(frozen=True, repr=False)
class LatentAttention(Attention):
    """One key of D = L + RD elements for all heads: a latent, which is the value too, and behind it what is turned.

    query_dim: elements of a head of q; the last RD of them are turned.
    spreads: whether a page has no V, for values are the first part of its keys: latent_spread.py.
    """

    query_dim: int = 0
    spreads: bool = False

    @property
    def value_dim(self) -> int:
        return self.head_dim - self.rotary_dim

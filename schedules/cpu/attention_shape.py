"""What the two kernels of paged attention agree on: the sizes, the bytes of a page, and how two numbers multiply."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.compiler.kernel import PAGE_TOKENS


@dataclass(frozen=True)
class Attention:
    """M rows of H query heads and KH key and value heads of D elements; G = H / KH query heads share one of each.

    rotary_dim: how many of the D elements rotary turns (0: none).  dot: "dpbf16" multiplies pairs of bf16,
    "widen" widens them first, "fma" is float32.  n_layers: layers whose parts make up a page.

    A page's part for one layer is KH heads, K before V in each, in words of 4 bytes (one float32 or two bf16):
        K [64/16][D/E][16]      word (t/16, d/E, t%16) holds elements d … d+E-1 of token t    (E = 1 or 2 elements)
        V [64/E][D']            word (t/E, d) holds element d of tokens t … t+E-1             (D' = D rounded up to 16)
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

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of one cached number."""
        return 4 if self.dot == "fma" else 2

    @property
    def per_word(self) -> int:
        return 4 // self.kv_bytes

    @property
    def padded_dim(self) -> int:
        return -(-self.head_dim // 16) * 16

    @property
    def key_words(self) -> int:
        """Words of K in one page and head."""
        return PAGE_TOKENS * self.head_dim // self.per_word

    @property
    def head_words(self) -> int:
        """Words of K and V in one page and head."""
        return self.key_words + PAGE_TOKENS * self.padded_dim // self.per_word

    @property
    def layer_bytes(self) -> int:
        return 4 * self.kv_heads * self.head_words

    @property
    def page_words(self) -> int:
        return self.n_layers * self.layer_bytes // 4

    @property
    def left_per_word(self) -> int:
        """Words of the left operand (a query, a probability) that meet one word of the cache."""
        return 2 if self.dot == "widen" else 1

    @property
    def query_words(self) -> int:
        """Words of one query head as the first kernel leaves it: float32, or pairs of bf16."""
        return self.head_dim // self.per_word * self.left_per_word

    @property
    def query_type(self) -> str:
        return "int32" if self.dot == "dpbf16" else "float32"

    def scratch_words(self, block: int) -> int:
        """float32 of a thread's own memory: S, P, O, and m, l, a of each query row of a block."""
        return block * self.group * (2 * PAGE_TOKENS + self.padded_dim + 3 * self.lanes)

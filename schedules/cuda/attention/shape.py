"""The sizes that the kernels of paged attention are compiled for, and how they are told.

A page's part for one layer is, for each key head, K and then V, both [D/8][64 tokens][8 elements]: eight tokens of a
chunk of 16 bytes lie together, an 8x8 matrix of `ldmatrix` and a core matrix of `wgmma` (include/attention.cuh).
float32 caches are [64 tokens][D] (include/attention_float32.cuh), int8 ones [D/16][64 tokens][16 codes] and then a
float32 scale for each token (include/attention_codes.cuh).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from llmc.compiler.kernel import PAGE_TOKENS, Call
from llmc.runtime.errors import LlmcError
from llmc.schedules.attention_call import BIASES, OF_HEADS, appended_sizes, attention_sizes, input_places

MOST_HEAD_DIM, MOST_ANY_DIM = 256, 512
"""The longest heads that most kernels take, and that kernels for any size take."""
CUDA_TYPES: Mapping[str, str] = {"bf16": "bf16", "f16": "f16", "f32": "float", "int8": "uint8_t"}
KV_BYTES: Mapping[str, int] = {"bf16": 2, "f16": 2, "f32": 4, "int8": 1}
SCALE_BYTES = 4
"""In an int8 cache each token has a scale for its key of each head, and one for its value."""


@dataclass(frozen=True)
class Attention:
    """M = rows rows of `heads` query heads, `kv_heads` key heads of D = head_dim elements, up to `pages` pages each.

    rotary_dim      elements of a head that rotary turns; 0: none
    kv_dtype        of the cache
    qkv             dtype of the queries, keys and values that come in: f32, or what is multiplied, in tiles
                    (compiler/kernel.py)
    out, tiled      the result's dtype, and whether it lies in tiles
    epsilon         of the norms of queries and keys; None: they are not normalised
    sinks, slopes   whether each query head has one
    page_bytes      of a page whose layers differ in size; 0: all layers are like this one
    own_value_dim   elements of a value; 0: D
    norms_values    whether values are normalised too
    reads_only      whether the cache is another layer's, which has appended to it
    both_ways       whether rows see all of their text, which is in the step whole, and windows reach to either side
    reach           how far biases that are looked up by distance reach to either side; 0: there are none
    """

    rows: int
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
    kv_dtype: str
    qkv: str
    out: str
    tiled: bool
    epsilon: float | None = None
    sinks: bool = False
    slopes: bool = False
    page_bytes: int = 0
    own_value_dim: int = 0
    norms_values: bool = False
    reads_only: bool = False
    both_ways: bool = False
    reach: int = 0

    @property
    def value_dim(self) -> int:
        return self.own_value_dim or self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def is_coded(self) -> bool:
        return self.kv_dtype == "int8"

    @property
    def factor(self) -> str:
        """Dtype of the operands of products."""
        return "f16" if self.is_coded else self.kv_dtype

    @property
    def factor_bytes(self) -> int:
        return KV_BYTES[self.factor]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K, or V, for one layer and key head."""
        return self.head_dim * KV_BYTES[self.kv_dtype] + (SCALE_BYTES if self.is_coded else 0)

    @property
    def layer_bytes(self) -> int:
        """Bytes of a page, for one layer."""
        both = 2 * self.token_bytes if not self.own_value_dim else KV_BYTES[self.kv_dtype] * self.dims
        return self.kv_heads * PAGE_TOKENS * both

    @property
    def dims(self) -> int:
        """Elements of a key and a value."""
        return self.head_dim + self.value_dim

    @property
    def context(self) -> int:
        """Tokens that a row attends on average; of a text that is read whole, as if it filled the step."""
        if self.both_ways:
            return min(self.rows, self.pages * PAGE_TOKENS, 2 * self.window - 1 if self.window else self.rows)
        return self.pages * PAGE_TOKENS // 2

    @property
    def types(self) -> dict[str, str]:
        """Shape's, as C++ says them."""
        names = {"T": self.factor, "Kv": self.kv_dtype, "Qkv": self.qkv, "Out": self.out}
        return {name: CUDA_TYPES[dtype] for name, dtype in names.items()}

    def source(self, **tiles: int) -> str:
        """`struct Shape` of include/attention.cuh, with a kernel's own tile sizes."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self)} | tiles
        elements = (self.page_bytes or self.n_layers * self.layer_bytes) // KV_BYTES[self.kv_dtype]
        members = [f"using {name} = {kind};" for name, kind in self.types.items()]
        members += [
            f"static constexpr {kind} {name} = {literal(numbers[name])};"
            for name, kind in (*MEMBERS.items(), *((tile, "int") for tile in tiles))
        ]
        if self.epsilon is not None:
            members.append(f"static constexpr float epsilon = {literal(self.epsilon)};")
        if self.norms_values:
            members.append("static constexpr bool norms_values = true;")
        if self.both_ways:
            members.append("static constexpr bool both_ways = true;")
        if self.reach:
            members.append(f"static constexpr int reach = {self.reach};")
        for name in OF_HEADS:
            if getattr(self, name):
                members.append(f"static constexpr bool has_{name} = true;")
        members.append(f"static constexpr int64_t page_elements = {elements};")
        return "\n".join(["struct Shape {", *(f"    {member}" for member in members), "};"])


MEMBERS = dict.fromkeys(("rows", "pages", "heads", "kv_heads", "head_dim", "rotary_dim", "window"), "int")
MEMBERS |= {"interleaved": "bool", "tiled": "bool", "scale": "float", "softcap": "float"}


def literal(number: float | bool) -> str:
    if isinstance(number, bool):
        return str(number).lower()
    return f"{number!r}f" if isinstance(number, float) else str(number)


def appended_to(call: Call) -> Attention | None:
    """The attention whose queries, keys and values a product makes that appends; None where a product does not."""
    sizes = appended_sizes(call)
    if sizes is None:
        return None
    found = of_sizes(call, sizes)
    return replace(found, qkv=found.kv_dtype, out=found.kv_dtype, tiled=False)


def parse(call: Call) -> Attention | None:
    """The attention that a call asks for, or None when it is something else.  Raises LlmcError for one that these
    kernels cannot do."""
    sizes = attention_sizes(call)
    return None if sizes is None else of_sizes(call, sizes)


def of_sizes(call: Call, sizes: dict[str, Any]) -> Attention:
    head_dim, kv_dtype = call.attribute("head_dim"), call.attribute("kv_dtype")
    if kv_dtype not in CUDA_TYPES:
        hint = f"one of {', '.join(CUDA_TYPES)}"
        raise LlmcError(f"a KV cache of {kv_dtype} is not there for NVIDIA GPUs", place="--kv-dtype", hint=hint)
    qkv, out, places = call.inputs[0], call.outputs[0], input_places(call)
    assert qkv is not None
    for size in (head_dim, sizes.get("own_value_dim", 0)):
        if size % 16 or size > MOST_ANY_DIM:
            fact = f"attention on NVIDIA GPUs takes heads of 16, 32 … {MOST_ANY_DIM} elements, not {size}"
            raise LlmcError(fact, place=call.op, hint="compile for a CPU target")
    lies = {"kv_dtype": kv_dtype, "qkv": qkv.dtype, "out": out.dtype, "tiled": out.tiled}
    reads_only = "queries" in places and len(qkv.shape) == 2  # those that a product hands over lie as pages do
    biases = call.inputs[places[BIASES]] if BIASES in places else None
    reach = biases.shape[1] // 2 if biases else 0
    lies |= {"sinks": "sinks" in places, "slopes": "slopes" in places, "reach": reach}
    found = Attention(**sizes, **lies, reads_only=reads_only)
    if takes_any(found) and (found.is_coded or found.qkv != "f32"):
        fact = "a KV cache in int8 on NVIDIA GPUs takes heads of up to 256 elements, values as long as keys, not shared"
        raise LlmcError(fact, place="--kv-dtype int8", hint="take bf16 or f32")
    return found


def takes_any(a: Attention) -> bool:
    """Whether only kernels that take any size do it (include/attention_any.cuh)."""
    return a.head_dim > MOST_HEAD_DIM or bool(a.own_value_dim) or a.reads_only

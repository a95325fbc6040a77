"""A product of each head of x with a matrix of its own on a GPU: llmc.HeadProduct, one launch.

A few tokens read each matrix once, all of it on its way at a time: 2 H N K bytes are the limit.  Prompts take 64 tokens
and 128 outputs a block (include/head_product.cuh).  y is f32, or tiled where a product alone reads it; so is x.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from llmc.compiler.kernel import DTYPE_BYTES, Call, DType, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.attention.stream import CHIPS, RESERVED_BYTES
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import TILE, Tiles
from llmc.schedules.experts_layout import OfExperts
from llmc.schedules.rule import Rule

MOST_TOKENS = 64
ROW_BYTES = 2 * TILE


@dataclass(frozen=True)
class Heads:
    """`rows` rows of `heads` heads, `stride` elements apart, of which k meet a matrix [n, k] each.  element: of the
    matrices; x, y: of what comes in and goes out, f32, or tiled in an element of 2 bytes."""

    rows: int
    heads: int
    n: int
    k: int
    stride: int
    element: Literal["bf16", "f16"]
    x: DType
    y: DType

    @property
    def columns(self) -> int:
        """Tiles along K."""
        return -(-self.k // TILE)


@dataclass(frozen=True)
class Block:
    """tokens: rows of x.  warps: of 16 outputs each.  stages: columns of tiles of the matrix that are asked for, with
    the one that is multiplied."""

    tokens: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens and {16 * self.warps} outputs, {self.stages} columns at a time"


def parse(call: Call) -> Heads | None:
    """The product that a call asks for, or None.  Raises LlmcError for matrices in float32."""
    if call.op != "llmc.HeadProduct":
        return None
    x, weight = call.inputs
    y = call.outputs[0]
    if x is None or weight is None or not weight.constant:
        return None
    if weight.dtype not in ("bf16", "f16"):
        fact = f"products of heads on NVIDIA GPUs are of matrices in bf16 or f16, not {weight.dtype}"
        raise LlmcError(fact, place=call.op, hint="--dtype bf16, or --target cpu")
    heads, n, k = weight.shape
    stride = x.shape[1] // heads
    whole = not x.tiled or (x.dtype == weight.dtype and k % 8 == 0 and stride % 8 == 0)
    if not whole or any(value.dtype != "f32" and not value.tiled for value in (x, y)):
        return None
    return Heads(x.shape[0], heads, n, k, stride, weight.dtype, x.dtype, y.dtype)


def match(call: Call, target: Target) -> Block | None:
    p = parse(call)
    if p is None:
        return None
    tokens = next(n for n in (16, 32, 64) if n >= min(p.rows, MOST_TOKENS))
    few = tokens < MOST_TOKENS
    block = Block(tokens, 4, p.columns + 1) if few or p.n <= TILE else Block(tokens, 8, min(p.columns + 1, 4))
    return next((each for each in smaller(block) if fits(p, each, target)), None)


def smaller(block: Block) -> Iterable[Block]:
    """The block, and others that want less and less shared memory."""
    for tokens in (64, 32, 16):
        if tokens <= block.tokens:
            yield from (replace(block, tokens=tokens, stages=n) for n in range(block.stages, 1, -1))


def fits(p: Heads, block: Block, target: Target) -> bool:
    return shared_bytes(p, block) <= CHIPS[target.arch].block_bytes - RESERVED_BYTES


def shared_bytes(p: Heads, block: Block) -> int:
    """Rows of x as a whole, and so many columns of tiles."""
    slots = min(block.stages, p.columns)
    return ROW_BYTES * (block.tokens * p.columns + 16 * block.warps * slots)


def space(call: Call, target: Target) -> Iterable[Block]:
    """Other blocks worth measuring."""
    p, best = parse(call), match(call, target)
    if p is None or best is None:
        return []
    others = [best, *(replace(best, warps=n) for n in (4, 8)), *(replace(best, stages=n) for n in (3, 5))]
    others += [replace(best, tokens=best.tokens // 2)] if best.tokens > 16 and p.rows > 16 else []
    return [each for each in dict.fromkeys(others) if each.stages <= p.columns + 1 and fits(p, each, target)]


def implement(call: Call, block: Block, target: Target) -> Implementation:
    p = parse(call)
    assert p is not None, "implement follows match"
    key = f"head_product_source({p!r}, {block!r})"
    name = f"head_product_m{p.rows}_h{p.heads}_n{p.n}_k{p.k}_{short_hash(key)}"
    source = partial(head_product_source, name, p, block)
    n_threads = 32 * block.warps
    kernel = Kernel(name, key, source, n_threads=n_threads, shared_bytes=shared_bytes(p, block), dependent=True)
    in_and_out = p.rows * p.heads * (DTYPE_BYTES[p.x] * p.k + DTYPE_BYTES[p.y] * p.n)
    launch = Launch(
        kernel,
        (Operand("input", 0), Operand("input", 1), Operand("output", 0)),
        p.heads * -(-p.n // (16 * block.warps)) * -(-p.rows // block.tokens),
        2 * p.heads * p.n * p.k + in_and_out,
        2 * p.rows * p.heads * p.n * p.k,
    )
    return Implementation((launch,), layouts={1: OfExperts(Tiles(p.element), p.heads)})


def head_product_source(name: str, p: Heads, block: Block) -> str:
    """The kernel's CUDA C++."""
    element, x, y = C_TYPES[p.element], C_TYPES[p.x], C_TYPES[p.y]
    sizes = {"rows": p.rows, "heads": p.heads, "n": p.n, "k": p.k, "stride": p.stride}
    sizes |= {"tokens": block.tokens, "warps": block.warps, "stages": block.stages}
    return (
        '#include "head_product.cuh"\n\n'
        "struct Shape {\n"
        f"    using X = {x};\n    using T = {element};\n    using Y = {y};\n"
        f"    static constexpr int {', '.join(f'{member} = {size}' for member, size in sizes.items())};\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * block.warps})\n'
        f"{name}(const {x} *x, const {element} *weight, {y} *y) {{\n"
        "    head_product<Shape>(x, weight, y);\n"
        "}\n"
    )


RULES = (Rule("head_product", match, implement, space),)

"""A page's values, spread out of its keys: latents are the first part of a key, and a page has them once.

Scores want K [64/16][D/E][16], a word of E elements of d for each of 16 tokens; weighted sums V [64/E][D'], a word of E
tokens for each d.  So before sums of some columns are formed, those of V are: a block of 16 tokens by 16 d (n by n in
float32, where vectors have n lanes) comes from as many vectors as it fills, changes places in log2(n) rounds of
shuffles, and goes to a few KiB of a thread's scratch memory.  All query rows of the block find it there, in the first
level cache: 16 heads or 128 of a token share it.

Shuffles: 4 a vector of the page, however many query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.amx import function
from llmc.schedules.cpu.attention.shape import Attention
from llmc.schedules.cpu.linear.panel import SECOND_LEVEL

TOKENS = 16
"""Tokens of a group of K's."""
BYTES = 64
"""Bytes of a group's words of one d, or E."""


def block_size(a: Attention) -> int:
    """Tokens of a block, and elements of d."""
    return TOKENS if a.per_word > 1 else a.lanes


def spread(a: Attention, kv: Any, base: Any, following: Any, columns: tuple[Any, int], to: Any, at: Any) -> None:
    """Columns (first, count) of the values of the page whose keys begin at word `base` of kv, to[at:] as words
    [64/E][count].  following: what is asked for meanwhile, the same words of the page there; None: nothing."""
    n, (first, count) = block_size(a), columns
    per_group = TOKENS // n
    with T.serial(PAGE_TOKENS // n) as rows, T.serial(count // n) as i:
        group = T.truncdiv(rows, per_group) * (a.head_dim // a.per_word)
        word = group + T.truncdiv(first + i * n, a.per_word)
        place = T.bind(T.cast(word * TOKENS + T.truncmod(rows, per_group) * n, "int64"))
        target = T.address_of(to[at + rows * (n // a.per_word * count) + i * n])
        operands = (T.address_of(kv[base + place]), target, T.int64(4 * count))
        if following is None:
            T.evaluate(T.call_extern("int32", "llmc_spread", *operands))
        else:
            T.evaluate(T.call_extern("int32", "llmc_spread_ask", *operands, T.address_of(kv[following + place])))


def spread_code(a: Attention) -> str:
    """llmc_spread(k, v, n), llmc_spread_ask(k, v, n, next): one block; rows of v are n bytes apart."""
    asked = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n" if a.dot != "tiles" else ""
    return asked + one_spread(a, asks=False) + one_spread(a, asks=True)


def one_spread(a: Attention, asks: bool) -> str:
    n = block_size(a)
    count, kind = n // a.per_word, f"<{n} x i32>"
    names = [f"%x{count.bit_length() - 1}_{i}" for i in range(count)]
    lines = []
    for i, name in enumerate(names):
        lines += [f"%k{i} = getelementptr i8, ptr %k, i64 {i * BYTES}", f"{name} = load {kind}, ptr %k{i}, align 4"]
        if asks:
            lines.append(f"%n{i} = getelementptr i8, ptr %next, i64 {i * BYTES}")
            lines.append(f"call void @llvm.prefetch.p0(ptr %n{i}, i32 0, i32 {SECOND_LEVEL}, i32 1)")
    for bit in reversed(range(count.bit_length() - 1)):
        names = swapped(lines, kind, names, bit, bit + a.per_word - 1)
    for i, name in enumerate(names):
        if a.per_word > 1:
            name = halves_swapped(lines, kind, name, i)
        lines += [
            f"%far{i} = mul i64 %n, {i}",
            f"%v{i} = getelementptr i8, ptr %v, i64 %far{i}",
            f"store {kind} {name}, ptr %v{i}, align 4",
        ]
    parameters = f"ptr %k, ptr %v, i64 %n{', ptr %next' * asks}"
    return function(f"llmc_spread{'_ask' * asks}", parameters, lines)


def halves_swapped(lines: list[str], kind: str, name: str, i: int) -> str:
    """A vector after the lowest bits of d and of the token, both within it, have changed places."""
    n = int(kind[1:].split()[0])
    halves, order = f"<{2 * n} x i16>", [4 * (j // 4) + (0, 2, 1, 3)[j % 4] for j in range(2 * n)]
    lines += [
        f"%h{i} = bitcast {kind} {name} to {halves}",
        shuffled(f"%s{i}", halves, f"%h{i}", f"%h{i}", order),
        f"%w{i} = bitcast {halves} %s{i} to {kind}",
    ]
    return f"%w{i}"


def swapped(lines: list[str], kind: str, names: Sequence[str], bit: int, lane_bit: int) -> list[str]:
    """The vectors after `bit` of their number and `lane_bit` of their lanes' numbers have changed places."""
    results = [f"%x{bit}_{i}" for i in range(len(names))]
    n, step, far = int(kind[1:].split()[0]), 1 << lane_bit, 1 << bit
    for i, name in enumerate(names):
        if i & far:
            continue
        first = [lane if not lane & step else n + lane - step for lane in range(n)]
        second = [lane + step if not lane & step else n + lane for lane in range(n)]
        for result, order in ((results[i], first), (results[i + far], second)):
            lines.append(shuffled(result, kind, name, names[i + far], order))
    return results


def shuffled(result: str, kind: str, a: str, b: str, order: Sequence[int]) -> str:
    mask = ", ".join(f"i32 {lane}" for lane in order)
    return f"{result} = shufflevector {kind} {a}, {kind} {b}, <{len(order)} x i32> <{mask}>"

"""The first kernel of latent attention: keep a row's latent in its page, and put its heads' queries together.

    for (row, head) in parallel:                                                      grid M * H
        head 0:  key = (latent / sqrt(mean(latent²) + e) · weight, rotate(what is behind it))     unless pos = -1
                 write key and, as the value, its first part into slot (page_table[row, pos / 64], pos % 64)
        q temp[row][head] = (absorbed, rotate(the end of the head of q)), as append.py hands it on

Reads H (L + RD) + L + RD float32 a row and writes H (L + RD) numbers and those of the cache.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.attention.append import (
    Head,
    hand_on,
    keep_key,
    keep_value,
    page_start,
    step_operands,
    turn_pairs,
)
from llmc.schedules.cpu.attention.shape import LatentAttention
from llmc.schedules.cpu.lanes import share, widest
from llmc.schedules.cpu.row_kernels import row_mean


def append_kernel(a: LatentAttention) -> Any:
    """(q, absorbed, kv, norm, cos, sin, positions, page_table, kv cache, [kv cache as scales,] queries, scratch [D],
    task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("append")
        latent_dim = a.value_dim
        sizes = {
            "q": a.m * a.heads * a.query_dim,
            "absorbed": a.m * a.heads * latent_dim,
            "kv": a.m * a.head_dim,
            "norm": latent_dim,
            "cos": a.m * a.rotary_dim // 2,
            "sin": a.m * a.rotary_dim // 2,
        }
        q, absorbed, kv, norm, *turn = (T.arg(name, T.buffer((n,), "float32")) for name, n in sizes.items())
        positions, page_table, cache, scales, queries, turned, task, n_tasks = step_operands(a, "cache", "queries")
        with share(a.m * a.heads, task, n_tasks) as unit:
            row, head = T.bind(T.truncdiv(unit, a.heads)), T.bind(T.truncmod(unit, a.heads))
            position = T.bind(positions[row])
            with T.If(T.And(head == 0, position >= 0)), T.Then():
                base = page_start(a, page_table, row, T.truncdiv(position, PAGE_TOKENS), 0)
                slot = T.bind(T.truncmod(position, PAGE_TOKENS))
                start = T.bind(row * a.head_dim)
                normalise(a, kv, start, norm, turned)
                turn_pairs(a, Head(a, kv, start + latent_dim, None), turn, row, turned, latent_dim)
                keep_key(a, turned, cache, scales, base, slot)
                if not a.spreads:
                    keep_value(a, turned, 0, cache, scales, base, slot)
            v = widest(latent_dim, a.lanes)
            with T.serial(latent_dim // v.n) as i:
                v.store(turned, i * v.n, v.load(absorbed, unit * latent_dim + i * v.n))
            end = T.bind(unit * a.query_dim + (a.query_dim - a.rotary_dim))
            turn_pairs(a, Head(a, q, end, None), turn, row, turned, latent_dim)
            hand_on(a, turned, queries, unit * a.query_words)
    return builder.get()


def normalise(a: LatentAttention, kv: Any, start: Any, weight: Any, y: Any) -> None:
    """y[: L] = the row's latent by RMSNorm."""
    n = a.value_dim
    v = widest(n, a.lanes)
    square = row_mean(v, kv, start, n, lambda value, partial: v.fma(value, value, partial))
    factor = v.keep(v.all(1.0) / T.sqrt(square + v.all(float(a.epsilon or 0))))
    with T.serial(n // v.n) as i:
        v.store(y, i * v.n, v.load(kv, start + i * v.n) * factor * v.load(weight, i * v.n))

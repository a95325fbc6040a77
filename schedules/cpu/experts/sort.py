"""The first and the last launch of a mixture of experts: pairs sorted by expert, and their results added up.

sort, in one task:
    count each expert's pairs; give those that have some their tiles; put each pair to the next place of its expert
so that an expert's pairs lie in the order of tokens.  A number that is no expert's counts as the nearest that is.

combine:
    for token, 512 columns in parallel:  y[m] = Σ_j share[m, j] · result[m k + j], j in order
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.experts.rule import COMBINE_COLUMNS, Table
from llmc.schedules.cpu.lanes import Lanes, share, widest

ONE = Lanes(1)
MOST_LANES = 16


def sort_function(table: Table) -> Any:
    """(index, table, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("sort_pairs")
        index = T.arg("index", T.buffer((table.pairs,), "int64"))
        words = T.arg("table", T.buffer((table.words,), "int32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())

        def expert_of(pair: Any) -> Any:
            number = T.max(T.min(index[pair], T.int64(table.experts - 1)), T.int64(0))
            return ONE.keep(T.cast(number, "int32"), "int32")

        with share(1, task, n_tasks):
            with T.serial(table.experts) as expert:
                T.buffer_store(words, T.int32(0), [table.counters_at + expert])
            with T.serial(table.pairs) as pair:
                at = table.counters_at + expert_of(pair)
                T.buffer_store(words, words[at] + 1, [at])
            give_tiles(table, words)
            with T.serial(table.pairs) as pair:
                at = table.counters_at + expert_of(pair)
                T.buffer_store(words, pair, [table.pairs_at + words[at]])
                T.buffer_store(words, words[at] + 1, [at])
    return builder.get()


def give_tiles(table: Table, words: Any) -> None:
    """Tiles for each expert that has pairs; its counter becomes the place of its first pair."""
    active, tile = (T.alloc_buffer((1,), "int32") for _ in range(2))
    T.buffer_store(active, T.int32(0), [0])
    T.buffer_store(tile, T.int32(0), [0])
    with T.serial(table.experts) as expert:
        count = ONE.keep(words[table.counters_at + expert], "int32")
        T.buffer_store(words, tile[0] * table.rows, [table.counters_at + expert])
        with T.If(count > 0), T.Then():
            T.buffer_store(words, expert, [table.experts_at + active[0]])
            T.buffer_store(words, tile[0], [table.first_at + active[0]])
            T.buffer_store(active, active[0] + 1, [0])
            with T.serial(T.truncdiv(count + (table.rows - 1), table.rows)) as i:
                T.buffer_store(words, T.min(count - i * table.rows, table.rows), [table.counts_at + tile[0]])
                T.buffer_store(tile, tile[0] + 1, [0])
    T.buffer_store(words, tile[0], [table.first_at + active[0]])
    T.buffer_store(words, active[0], [0])
    T.buffer_store(words, tile[0], [1])


def combine_function(table: Table, n: int) -> Any:
    """(share, results, y, task, n_tasks)."""
    v = widest(n, MOST_LANES)
    blocks = -(-n // COMBINE_COLUMNS)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("combine_pairs")
        shares = T.arg("share", T.buffer((table.pairs,), "float32"))
        results = T.arg("results", T.buffer((table.pairs * n,), "float32"))
        y = T.arg("y", T.buffer((table.tokens * n,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        with share(table.tokens * blocks, task, n_tasks) as unit:
            token = T.bind(T.truncdiv(unit, blocks))
            first = T.bind(T.truncmod(unit, blocks) * COMBINE_COLUMNS)
            with T.serial(T.truncdiv(T.min(COMBINE_COLUMNS, n - first), v.n)) as i:
                total = v.keep(v.all(0.0))
                for j in range(table.chosen):
                    pair = token * table.chosen + j
                    result = v.load(results, pair * n + first + i * v.n)
                    total = v.keep(v.fma(v.all(shares[pair]), result, total))
                v.store(y, token * n + first + i * v.n, total)
    return builder.get()

"""The second kernel of paged attention (and a third, small one): which rows, heads and splits each task takes.

    large steps:   for (kv head, block of B rows) in parallel:                       grid KH * ceil(M / B)
                       a block of one sequence at consecutive positions goes through at once, any other row by row

    small steps:   for (row, kv head, split of 512 tokens) in parallel:              at most M * KH * splits
                       m, l and O of the split, to memory
                   for (row, kv head) in parallel: merge its splits in order         grid M * KH
                   Where all rows are one sequence, they are one block: (kv head, split) in parallel.

A small step's tasks share out what there is to do, which positions tell: two threads halve one long context of one
key head.  Where rows and heads alone are many, their splits stay together and nothing goes through memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.schedules.cpu.attention.ahead import AheadBlock, AheadTiledBlock
from llmc.schedules.cpu.attention.amx import TiledBlock, tile_code
from llmc.schedules.cpu.attention.shape import Attention
from llmc.schedules.cpu.attention.softmax import State, intrinsics
from llmc.schedules.cpu.attention.tiles import Block
from llmc.schedules.cpu.lanes import share

KINDS: tuple[type[Block], type[Block]] = (Block, TiledBlock)
AHEAD_KINDS: tuple[type[Block], type[Block]] = (AheadBlock, AheadTiledBlock)


class Walk:
    """The operands of an attending kernel, as blocks of one row and of `block` rows."""

    def __init__(self, a: Attention, block: int, splits: bool, kinds: tuple[type[Block], type[Block]] = KINDS) -> None:
        """kinds: of blocks, in vectors and in tiles."""
        self.a, self.block = a, block
        q = T.arg("q", T.buffer((a.m * a.heads * a.query_words,), a.query_type))
        positions = T.arg("positions", T.buffer((a.m,), "int32"))
        sees = sees_of(a)
        page_table = T.arg("page_table", T.buffer((a.m * a.pages,), "int32"))
        kv = T.arg("kv", T.buffer((T.int64(1 << 40),), a.word_type))
        scales = T.arg("scales", T.buffer((T.int64(1 << 40),), "float32")) if a.is_int8 else None
        slopes = slopes_of(a)
        sinks = None if splits else sinks_of(a)
        results = split_words(a) if splits else a.m * a.heads * a.value_dim
        self.out = T.arg("out", T.buffer((results,), "float32"))
        scratch = T.arg("scratch", T.buffer((a.scratch_words(block),), "float32"))
        self.task, self.n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        kind = (AHEAD_KINDS if a.ahead else kinds)[a.dot == "tiles"]
        rest = (q, positions, page_table, kv, scales, self.out, scratch, sinks, slopes, sees)
        self.one, self.many = (kind(a, n, *rest) for n in (1, block))

    def imports(self) -> AbstractContextManager[Any]:
        tiles = tile_code(self.a, (1, self.block)) if self.a.dot == "tiles" else ""
        text: AbstractContextManager[Any] = T.attr(0, "pragma_import_llvm", intrinsics(self.a) + tiles)
        return text


def sees_of(a: Attention) -> Any:
    """The operand with the last position that each row sees, where that may be behind its own."""
    return T.arg("sees", T.buffer((a.m,), "int32")) if a.ahead else None


def sinks_of(a: Attention) -> Any:
    """The operand with a score for each query head, where the attention has sinks."""
    return T.arg("sinks", T.buffer((a.heads,), "float32")) if a.sinks else None


def slopes_of(a: Attention) -> Any:
    """The operand with each query head's slope, or with its biases by distance, where the attention has some."""
    of_each = 2 * a.reach if a.distances else 1
    return T.arg("slopes", T.buffer((a.heads * of_each,), "float32")) if a.alibi or a.distances else None


def attend_kernel(a: Attention, block: int) -> Any:
    """Large steps: (q, positions, [sees,] page_table, kv, [kv as scales,] [slopes,] [sinks,] out, scratch, task,
    n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attend")
        walk = Walk(a, block, splits=False)
        blocks = -(-a.m // block)
        with walk.imports(), share(a.kv_heads * blocks, walk.task, walk.n_tasks) as unit:
            head, index = T.bind(T.truncdiv(unit, blocks)), T.bind(T.truncmod(unit, blocks))
            half = T.truncdiv(index, 2)  # early rows see little, late ones much: every task gets some of both
            row = T.bind(T.Select(T.truncmod(index, 2) == 0, half, blocks - 1 - half) * block)
            if block == 1:
                walk.one.attend(row, head)
            else:
                with T.If(walk.many.is_one_sequence(row)):
                    with T.Then():
                        walk.many.attend(row, head)
                    with T.Else(), T.serial(T.min(block, a.m - row)) as i:
                        walk.one.attend(row + i, head)
    return builder.get()


def attend_small_kernel(a: Attention, block: int, splits: bool) -> Any:
    """Small steps: as above, but for `splits`, where `out` are the states of all (row, kv head, split), and the merge
    takes the sinks."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attend")
        walk = Walk(a, block, splits)
        with walk.imports():
            if block == 1:
                each_row(walk, splits)
            else:
                with T.If(walk.many.is_one_sequence(0)):
                    with T.Then():
                        count = T.bind(n_units(walk.many, 0, splits))
                        first = T.truncdiv(count * walk.task, walk.n_tasks)
                        end = T.bind(T.truncdiv(count * (walk.task + 1), walk.n_tasks))
                        with T.serial(first, end) as unit:
                            attend_unit(walk, walk.many, 0, unit, unit + 1 < end, splits)
                    with T.Else():
                        each_row(walk, splits)
    return builder.get()


def each_row(walk: Walk, splits: bool) -> None:
    """A task's share of the units of all rows, each row by itself."""
    a, one = walk.a, walk.one
    count, done = (T.alloc_buffer((1,), "int32") for _ in range(2))
    T.buffer_store(count, 0, [0])
    with T.serial(a.m) as row:
        T.buffer_store(count, count[0] + n_units(one, row, splits), [0])
    first = T.bind(T.truncdiv(count[0] * walk.task, walk.n_tasks))
    end = T.bind(T.truncdiv(count[0] * (walk.task + 1), walk.n_tasks))
    T.buffer_store(done, 0, [0])
    with T.serial(a.m) as row:
        own = T.bind(n_units(one, row, splits))
        start = T.bind(T.max(first - done[0], 0))
        share_end = T.bind(T.min(end - done[0], own))
        with T.serial(T.max(share_end - start, 0)) as i:
            attend_unit(walk, one, row, start + i, start + i + 1 < share_end, splits)
        T.buffer_store(done, done[0] + own, [0])


def n_units(block: Block, row: Any, splits: bool) -> Any:
    """Units of work that a block is: its heads, or the splits of each."""
    return block.a.kv_heads * (T.max(block.end_split(row) - block.first_split(row), 0) if splits else 1)


def attend_unit(walk: Walk, block: Block, row: Any, unit: Any, goes_on: Any, splits: bool) -> None:
    """One unit of a block.  goes_on: whether the next unit is this task's too."""
    if not splits:
        block.attend(row, unit)
        return
    first = T.bind(block.first_split(row))
    own = T.bind(block.end_split(row) - first)
    head, split = T.bind(T.truncdiv(unit, own)), T.bind(first + T.truncmod(unit, own))
    block.attend_split(row, head, split, split_state(walk.a, walk.out, row, head, split), goes_on)


def split_words(a: Attention) -> int:
    """float32 of the states of all (row, kv head, split)."""
    return a.m * a.kv_heads * a.splits * a.group * a.state_words


def split_state(a: Attention, memory: Any, row: Any, head: Any, split: Any) -> State:
    """Where a split's state lies for the block that starts at `row`: [row][kv head][split][group]."""
    words = a.group * a.state_words
    start = T.bind(((row * a.kv_heads + head) * a.splits + split) * words)
    return State(memory, start, a.group, a.kv_heads * a.splits * words, a.lanes, a.state_words)


def merge_kernel(a: Attention) -> Any:
    """(positions, [sees,] [sinks,] states of all (row, kv head, split), out, task, n_tasks): out, from its splits in
    order."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("merge")
        positions = T.arg("positions", T.buffer((a.m,), "int32"))
        sees = sees_of(a)
        sinks = sinks_of(a)
        states = T.arg("states", T.buffer((split_words(a),), "float32"))
        out = T.arg("out", T.buffer((a.m * a.heads * a.value_dim,), "float32"))
        task, n_tasks = T.arg("task", T.int32()), T.arg("n_tasks", T.int32())
        kind = AheadBlock if a.ahead else Block
        block = kind(a, 1, None, positions, None, None, None, out, None, sinks, sees=sees)
        with T.attr(0, "pragma_import_llvm", intrinsics(a)), share(a.m * a.kv_heads, task, n_tasks) as unit:
            row, head = T.bind(T.truncdiv(unit, a.kv_heads)), T.bind(T.truncmod(unit, a.kv_heads))
            first = T.bind(block.first_split(row))
            into = split_state(a, states, row, head, first)
            with T.serial(T.max(block.end_split(row) - first - 1, 0)) as i:
                other = replace(into, start=into.start + (i + 1) * (a.group * a.state_words))
                block.softmax.merge(into, other)
            block.softmax.finish(row, head, into, out)
    return builder.get()

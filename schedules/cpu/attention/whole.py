"""Attention of an encoder: a block of a text's rows over all of that text, which is in this step whole.

    for (kv head, block of up to B rows of one text) in parallel:
        through the pages that its rows see, in order: as tiles.py has it, but for where a text ends

A text's blocks begin at every B-th of its positions.  The last one may have fewer rows: what is computed of the rows
behind them is not kept, so that a step of many short texts has as many blocks as texts, and each is arithmetic.  Where
texts end is seen on the way: a row is its text's last where the next one does not go on from it.

Operations: 4 H D for each row and token of its text, or of its window.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.schedules.cpu.attention.amx import TiledBlock
from llmc.schedules.cpu.attention.shape import Attention
from llmc.schedules.cpu.attention.softmax import Sight, Softmax, State
from llmc.schedules.cpu.attention.tiles import Block
from llmc.schedules.cpu.attention.walk import Walk
from llmc.schedules.cpu.lanes import LOG2_E, widest


class WholeSoftmax(Softmax):
    """The softmax of rows that see what is behind them.  last: the last position of their text."""

    last: Any = None

    def position(self, row: Any, r: Any) -> Any:
        return super().position(T.min(row, self.a.m - 1 - T.truncdiv(r, self.a.group)), r)

    def sight(self, page: Any, position: Any) -> Sight:
        most = self.last - position
        if self.a.window:
            most = T.min(most, self.a.window - 1)
        return super().sight(page, position)._replace(most=T.bind(most))

    def slope(self, head: Any, r: Any) -> Any:
        """Where the biases of a query row's head begin that are looked up by distance, at distance 0; None: there are
        none."""
        of_head = head * self.a.group + T.truncmod(r, self.a.group)
        return T.bind(of_head * (2 * self.a.reach) + self.a.reach) if self.a.distances else None

    def biased(self, score: Any, ahead: Any, token: int, slope: Any) -> Any:
        """The score and its bias.  A row that is not of the text may be nowhere: what it looks up is not kept."""
        v = self.v
        first = slope + T.min(ahead, self.a.reach - PAGE_TOKENS) + token
        return v.keep(v.fma(v.load(self.slopes, first), v.all(LOG2_E), score))

    def finish(self, row: Any, head: Any, state: State, out: Any) -> None:
        """out = O / l for the rows of the text."""
        n_left = T.bind(self.last - self.positions[row] + 1)
        with T.serial(self.rows) as r, T.If(T.truncdiv(r, self.a.group) < n_left), T.Then():
            self.finish_row(r, row, head, state, out)


class WholeText:
    """What a block of such rows does otherwise than one of rows that see what is before them."""

    softmax_kind = WholeSoftmax

    def attend_text(self: Any, row: Any, head: Any, last: Any) -> None:
        """The block of the text that ends at position `last` which starts at `row`."""
        self.softmax.last = T.bind(last)
        self.attend(row, head)

    def last_position(self: Any, row: Any) -> Any:
        return self.softmax.last

    def last_seen(self: Any, row: Any) -> Any:
        if not self.a.window:
            return self.softmax.last
        return T.bind(T.min(self.softmax.last, self.positions[row] + (self.n - 1 + self.a.window - 1)))


class WholeBlock(WholeText, Block):
    """A block of whole texts, multiplied in vectors."""


class WholeTiledBlock(WholeText, TiledBlock):
    """A block of whole texts, multiplied in tiles of AMX."""


def attend_whole_kernel(a: Attention, block: int) -> Any:
    """(q, positions, page_table, kv, [kv as scales,] [biases,] out, scratch, task, n_tasks)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("attend")
        walk = Walk(a, block, splits=False, kinds=(WholeBlock, WholeTiledBlock))
        block_of, positions = walk.many, walk.many.positions
        assert isinstance(block_of, WholeText)
        count, last = (T.alloc_buffer((1,), "int32") for _ in range(2))
        with walk.imports():
            T.buffer_store(count, 0, [0])
            with T.serial(a.kv_heads) as head:
                T.buffer_store(last, -1, [0])
                with T.serial(a.m) as i:
                    row = T.bind(a.m - 1 - i)
                    position = T.bind(positions[row])
                    with T.If(positions[T.min(row + 1, a.m - 1)] != position + 1), T.Then():
                        T.buffer_store(last, position, [0])
                    with T.If(T.And(position >= 0, T.truncmod(position, block) == 0)), T.Then():
                        with T.If(T.truncmod(count[0], walk.n_tasks) == walk.task), T.Then():
                            block_of.attend_text(row, head, last[0])
                        T.buffer_store(count, count[0] + 1, [0])
            with T.serial(a.m) as row:
                is_own = T.truncmod(row, walk.n_tasks) == walk.task
                with T.If(T.And(positions[row] < 0, is_own)), T.Then():
                    forget(a, walk.out, row)
    return builder.get()


def forget(a: Attention, out: Any, row: Any) -> None:
    """Zeros for a row that pads the step."""
    columns = a.heads * a.value_dim
    v = widest(columns, a.lanes)
    with T.serial(columns // v.n) as i:
        v.store(out, row * columns + i * v.n, v.all(0.0))

"""Rows that see what is behind them too, up to a position that each is told: those of a picture, all of it.

    as walk.py has it, but for where a row's sight ends

Whatever a row sees behind itself is of the same step: its keys and values are in the pages when it attends.  A row that
sees no further than itself goes through the same operations as in a kernel that knows of nothing else.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.cpu.attention.amx import TiledBlock
from llmc.schedules.cpu.attention.softmax import Sight, Softmax
from llmc.schedules.cpu.attention.tiles import Block


class AheadSoftmax(Softmax):
    """The softmax of such rows."""

    def sight_of(self, page: Any, row: Any, r: Any) -> Sight:
        position = self.position(row, r)
        last = self.sees[row + (T.truncdiv(r, self.a.group) if self.n > 1 else 0)]
        return self.sight(page, position)._replace(most=T.bind(last - position))


class Ahead:
    """What a block of such rows does otherwise."""

    softmax_kind = AheadSoftmax

    def last_position(self: Any, row: Any) -> Any:
        """The last position that a row of the block sees: up to there its pages are written."""
        if self.n == 1:
            return T.bind(self.sees[row])
        last = T.alloc_buffer((1,), "int32")
        T.buffer_store(last, self.sees[row], [0])
        with T.serial(1, self.n) as i:
            T.buffer_store(last, T.max(last[0], self.sees[row + i]), [0])
        return T.bind(last[0])


class AheadBlock(Ahead, Block):
    """A block of rows that look ahead, multiplied in vectors."""


class AheadTiledBlock(Ahead, TiledBlock):
    """A block of rows that look ahead, multiplied in tiles of AMX."""

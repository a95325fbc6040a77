"""Angles of tokens whose positions have several directions.

GatherTurned    a row of a table, each column of which is looked up at the position in one of the directions
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import operator

GATHER_TURNED = "GatherTurned"
N_TURNS = 3
"""Directions of a token's position: time, height and width."""
TURNED = "llmc.turned"
"""In the metadata of a tower's graph: a picture's rows have positions in several directions in the text."""


@operator(lambda s, _: [(*s[1][:-1], s[0][1])])
def GatherTurned(op: Any, table: ir.Value, turns: ir.Value, *, directions: list[int]) -> Any:
    """y[m, c] = table[turns[m, directions[c]], c].

    table [N, C], turns i64[M, 3], or [batch, sequence, 3], directions [C] -> [M, C], or [batch, sequence, C].
    Wang et al. 2024, arXiv:2409.12191.
    """
    at = op.Gather(turns, op.Constant(value_ints=directions), axis=-1)
    columns = op.Shape(table, start=1, end=2)
    rows = op.Reshape(at, op.Concat(op.ints(-1), columns, axis=0))
    return op.Reshape(op.GatherElements(table, rows, axis=0), op.Shape(at))

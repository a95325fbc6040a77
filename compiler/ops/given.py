"""Rows of numbers in the place of tokens' embeddings, as those of a picture are: `inputs_embeds` of transformers.

Embedded        where a model has its tokens' embeddings, and would take other rows in their place
TakeGiven       a step's rows there: each its token's, or one that is given
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import like_first, operator

EMBEDDED, TAKE_GIVEN = "Embedded", "TakeGiven"
SEES_AHEAD = "llmc.sees_ahead"
"""In the metadata of a tower's graph: a picture's rows see each other in the text."""
SIZED, IN_WINDOWS = "llmc.sized", "llmc.in_windows"
"""There too, of one that takes pictures of any size: what it is made for, the numbers of a Sized; and which of its
attentions, by number, are within windows."""

OF_PATCHES = ("window_positions", "window_page_table", "line", "column", "taps", "shares")
"""Inputs of its graph beside those of other towers."""


def window_name(name: str) -> str:
    """Of the input of a tower's graph that says the same as another one, within windows."""
    return f"window_{name}"


@operator(like_first)
def Embedded(op: Any, x: ir.Value) -> Any:
    """x, which are the embeddings of tokens.    x [M, K], or [batch, sequence, K] -> like x."""
    return op.Identity(x)


@operator(like_first)
def TakeGiven(op: Any, x: ir.Value, is_given: ir.Value, given: ir.Value) -> Any:
    """given[m] where is_given[m] is not 0, else x[m].    x, given [M, K], is_given int64[M] -> [M, K]."""
    mark = op.Cast(op.Unsqueeze(is_given, op.ints(1)), to=int(ir.DataType.BOOL))
    return op.Where(mark, given, x)

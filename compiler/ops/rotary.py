"""Rotary embeddings: queries and keys turned by angles that their positions say.  __init__.py says what M and D are."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import like_first, operator


@operator(like_first)
def Rotary(
    op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, *, num_heads: int, rotary_dim: int, interleaved: int
) -> Any:
    """Turn the first RD = rotary_dim elements of each head by pairs: (a, b) -> (a cos - b sin, b cos + a sin).

    A pair is (i, i + RD/2), or (2i, 2i + 1) when interleaved. x [M, num_heads · D], cos, sin [M, RD/2] -> like x.
    Su et al. 2021, arXiv:2104.09864.
    """
    batch = op.ints(0)
    y = op.RotaryEmbedding(
        *(op.Unsqueeze(value, batch) for value in (x, cos, sin)),
        num_heads=num_heads,
        rotary_embedding_dim=rotary_dim,
        interleaved=interleaved,
    )
    return op.Squeeze(y, batch)


def turn(op: Any, q: Any, k: Any, cos: Any, sin: Any, heads: tuple[Any, Any], rotary_dim: Any, interleaved: Any) -> Any:
    """Queries and keys turned by Rotary; heads: how many of either."""
    settings = {"rotary_dim": rotary_dim, "interleaved": interleaved}
    return [Rotary(op, x, cos, sin, num_heads=n, **settings) for x, n in zip((q, k), heads, strict=True)]

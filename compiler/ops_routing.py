"""The operators of routers: which experts a token may choose.  See ops.py for what M is; E counts experts."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from llmc.compiler.ops_define import like_first, operator


@operator(like_first)
def KeepGroups(op: Any, scores: ir.Value, *, num_groups: int, kept: int, best: int, fill: float) -> Any:
    """Each token's scores in the `kept` best of its `num_groups` groups of experts; `fill` in place of all others.

    A group is E / num_groups experts in a row, and as good as the sum of its `best` largest scores; of groups that are
    as good as each other the first is taken.  scores [M, E] -> like scores.    DeepSeek-AI 2024, arXiv:2412.19437.
    """
    groups = op.Reshape(scores, op.ints(0, num_groups, -1))
    largest, _ = op.TopK(groups, op.ints(best), axis=-1, n_results=2)
    _, index = op.TopK(op.ReduceSum(largest, op.ints(2), keepdims=0), op.ints(kept), axis=-1, n_results=2)
    numbers = op.Range(op.scalar(0), op.scalar(num_groups), op.scalar(1))
    hits = op.Where(op.Equal(op.Unsqueeze(index, op.ints(2)), numbers), op.scalar(1.0), op.scalar(0.0))
    is_kept = op.Greater(op.ReduceMax(hits, op.ints(1), keepdims=0), op.scalar(0.0))  # [M, num_groups]
    return op.Reshape(op.Where(op.Unsqueeze(is_kept, op.ints(2)), groups, op.scalar(fill)), op.ints(0, -1))

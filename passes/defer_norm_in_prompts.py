"""Let norms between products be deferred in steps of many tokens too.

rewrite:
    y, scaled, moments = llmc.LinearResidualMoments(x, W, residual, g)
    z = llmc.DeferredRMSNormLinear…(y, g, V, …, scaled, moments)
    -->
    y, scaled, moments = llmc.LinearResidualTileMoments(x, W, residual, g)
    z = llmc.DeferredRMSNormLinear…(y, g, V, …, scaled, moments)

    and of products with a bias, and LayerNorm, the same
refuses: moments with another user than such a product; weights that are not multiplied in bfloat16, which alone has the
range for sums that are not normalised.

TileMoments are moments of 64 columns, those of one tile; their presence tells the schedules of both products that this
norm is no launch of its own (schedules/cuda/deferred_norm.py).  For prompts on GPUs: such a launch would read y in
float32 and write it again, rounded; here y is rounded where it is made.
"""

from __future__ import annotations

import onnx_ir as ir

from llmc.compiler.bind import weight_dtype
from llmc.compiler.graph import emit, op_name, replace
from llmc.compiler.kernel import TILE_COLUMNS
from llmc.compiler.ops import moments_name
from llmc.passes.defer_norm import IN_FRONT

PREPARING = {
    f"llmc.{moments_name(product)}": f"llmc.{moments_name(product, TILE_COLUMNS)}"
    for product in (name.removeprefix("llmc.") for name in IN_FRONT)
}


def defer_norm_in_prompts(model: ir.Model) -> int:
    """Assumes a step graph after defer_norm; leaves no norm that is deferred in steps of few tokens but not in those of
    many.  Returns the number of norms."""
    n_rewrites = 0
    for node in list(model.graph):
        name = PREPARING.get(op_name(node))
        if name is None or not fits(node):
            continue
        results = emit(node, name, node.inputs, n_results=3, like=node)
        made = results[0].producer()
        assert made is not None
        made.name = node.name
        for old, new in zip(list(node.outputs), results, strict=True):
            replace(old, new)
        n_rewrites += 1
    return n_rewrites


def fits(front: ir.Node) -> bool:
    _, scaled, moments = front.outputs
    users = {use.node for value in (scaled, moments) for use in value.uses()}
    is_known = all(op_name(node).startswith("llmc.Deferred") for node in users)
    return is_known and len(users) == 1 and weight_dtype(front) == "bf16"

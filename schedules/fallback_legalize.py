"""Loops for operators that TVM leaves to calls of its own runtime: TopK and CumSum, by counting.

Each takes n² steps for an axis of n elements, which is good enough for the short axes that they have in language models
(experts, beams).
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx


def topk(builder: Any, call: Any) -> Any:
    """The k largest (or smallest) elements of an axis and their indices, in order; of equals the first comes first."""
    attributes = call.attrs
    k, largest, dtype = int(attributes.k), bool(attributes.largest), str(attributes.dtype)
    rank_of_x = len(call.args[0].ty.shape)
    axis = int(attributes.axis) % rank_of_x

    def loops(x: Any) -> Any:
        n = int(x.shape[axis])
        shape = [*x.shape[:axis], k, *x.shape[axis + 1 :]]

        def rank(*at: Any) -> Any:
            """How many elements come before this one."""
            other = te.reduce_axis((0, n), "other")
            mine, theirs = x(*at), x(*at[:axis], other, *at[axis + 1 :])
            before = theirs > mine if largest else theirs < mine
            first = tirx.And(tirx.EQ(theirs, mine), other < at[axis])
            return te.sum(tirx.Select(tirx.Or(before, first), tirx.const(1, dtype), tirx.const(0, dtype)), axis=other)

        ranks = te.compute(x.shape, rank, "ranks")

        def place(*at: Any) -> Any:
            element = te.reduce_axis((0, n), "element")
            hit = tirx.EQ(ranks(*at[:axis], element, *at[axis + 1 :]), at[axis].astype(dtype))
            return te.sum(tirx.Select(hit, element.astype(dtype), tirx.const(0, dtype)), axis=element)

        found = te.compute(shape, place, "found")
        # Elements that cannot be compared (NaN) share ranks: their places add up, and must stay inside.
        indices = te.compute(shape, lambda *at: te.min(found(*at), tirx.const(n - 1, dtype)), "indices")
        values = te.compute(shape, lambda *at: x(*at[:axis], indices(*at), *at[axis + 1 :]), "values")
        return values, indices

    return builder.call_te(loops, call.args[0])


def cumsum(builder: Any, call: Any) -> Any:
    """Each element with all before it along an axis."""
    axis = int(call.attrs.axis) % len(call.args[0].ty.shape)
    exclusive = bool(call.attrs.exclusive)

    def loops(x: Any) -> Any:
        def total(*at: Any) -> Any:
            other = te.reduce_axis((0, x.shape[axis]), "other")
            counts = other < at[axis] if exclusive else other <= at[axis]
            value = x(*at[:axis], other, *at[axis + 1 :])
            return te.sum(tirx.Select(counts, value, tirx.const(0, x.dtype)), axis=other)

        return te.compute(x.shape, total, "cumsum")

    return builder.call_te(loops, call.args[0])


LEGALIZE = {"relax.topk": topk, "relax.cumsum": cumsum}

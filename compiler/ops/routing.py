"""The operators of routers: which experts a token may choose, and which it does.

See __init__.py for what M is; E counts experts.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import onnx_ir as ir

from llmc.compiler.ops.define import ATTRIBUTE_TYPES, define, like_first, operator


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


SCORES = ("Softmax", "Sigmoid")
"""What makes scores of a router's products."""


def router_name(scores: str, bias: bool, groups: bool, normed: bool) -> str:
    """`Router{Softmax|Sigmoid}{Bias}{Groups}{Normed}`."""
    return f"Router{scores}{'Bias' * bias}{'Groups' * groups}{'Normed' * normed}"


FLAGS = (False, True)
ROUTERS: dict[str, tuple[str, bool, bool, bool]] = {
    router_name(*parts): parts for parts in product(SCORES, FLAGS, FLAGS, FLAGS)
}
"""What makes the scores; whether a bias is added for the choice only, whether experts are in groups, and whether shares
are divided by their sum."""
GROUPS = {"num_groups": "int", "kept": "int", "best": "int", "fill": "float"}
"""Attributes of KeepGroups."""
MOST_CHOSEN, MOST_GROUPS, MOST_BEST, MOST_EXPERTS = 32, 32, 2, 1024
"""Limits of the kernel that does a router in one launch on a GPU, a warp a token (schedules/cuda/router.py)."""


def router_fits(experts: int, k: int, num_groups: int = 1, best: int = 1) -> bool:
    """Whether a GPU's kernel takes a router of these sizes."""
    fits = k <= min(MOST_CHOSEN, experts) and experts <= MOST_EXPERTS
    return fits and num_groups <= MOST_GROUPS and best <= MOST_BEST


def define_router(name: str, scores: str, bias: bool, groups: bool, normed: bool) -> None:
    """Register a router: x [M, E], bias [E] -> share [M, k], index int64[M, k]."""

    def body(op: Any, x: ir.Value, *biases: ir.Value, k: Any, **settings: Any) -> Any:
        score = op.Softmax(x, axis=-1) if scores == "Softmax" else op.Sigmoid(x)
        better = op.Add(score, *biases) if bias else score
        if groups:
            better = KeepGroups(op, better, **{key: settings[key] for key in GROUPS})
        _, index = op.TopK(better, op.ints(k), axis=-1, n_results=2)
        share = op.GatherElements(score, index, axis=1)
        if normed:
            total = op.ReduceSum(share, op.ints(1), keepdims=1)
            share = op.Div(share, op.Max(total, op.scalar(settings["least"])))
        return share, index

    doc = (
        f"index: the k experts of the largest {scores.lower()}(x){' + bias' * bias}{', in the best groups' * groups}; "
        f"share: {scores.lower()}(x) there{', over their sum, which is at least `least`' * normed}.    "
        "x [M, E], bias [E] -> share [M, k], index int64[M, k].    Shazeer et al. 2017, arXiv:1701.06538."
    )
    attributes = {"k": "int"} | (GROUPS if groups else {}) | ({"least": "float"} if normed else {})
    kinds = {key: ATTRIBUTE_TYPES[kind] for key, kind in attributes.items()}
    inputs = ["x", "bias"][: 1 + bias]
    define(name, inputs, kinds, body, lambda s, a: [(s[0][0], a["k"]), (s[0][0], a["k"])], doc)


for _name, (_scores, _bias, _groups, _normed) in ROUTERS.items():
    define_router(_name, _scores, _bias, _groups, _normed)

"""Let one operator choose each token's experts and work out their shares.

rewrite:
    s = Softmax(x)
    v, index = TopK(s, k)
    llmc.Experts…(h, index, Div(v, ReduceSum(v)), …)
    -->
    share, index = llmc.RouterSoftmaxNormed(x, k, least=0)
    llmc.Experts…(h, index, share, …)

    likewise Sigmoid; s + bias, and llmc.KeepGroups of that, for the choice alone; shares as they are; Div by a sum that
    is clipped from below; and Softmax(v) of the k largest of x itself, which are softmax(x) over their sum

    Mul(share, a number) stays, behind the router, and so does Mul(share, Gather(a scale for each expert, index)).
refuses: shares that are not made of the scores by which experts are chosen; a bias that is no constant [E]; more
    experts, groups or choices than the kernel takes.

For GPUs, where each of these operators would be a launch, and TopK one that goes through all pairs of scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import onnx_ir as ir

from llmc.compiler.graph import attribute, constant, emit, is_experts, is_last_axis, number, producer, replace
from llmc.compiler.graph.shapes import dims, ints
from llmc.compiler.ops import GROUPS, router_fits, router_name
from llmc.passes.form_attention import unscaled
from llmc.passes.form_groups import takes_largest


class Router(NamedTuple):
    """What a router does; bias: None where there is none; settings: attributes of the operator."""

    x: ir.Value
    scores: str
    bias: ir.Value | None
    normed: bool
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return router_name(self.scores, self.bias is not None, "kept" in self.settings, self.normed)

    @property
    def fits(self) -> bool:
        """Whether there is a kernel for its sizes."""
        sizes = {key: self.settings[key] for key in ("k", "num_groups", "best") if key in self.settings}
        experts = dims(self.x)[-1]
        return isinstance(experts, int) and router_fits(experts, **sizes)


def fuse_router(model: ir.Model) -> int:
    """Assumes a step graph; leaves no router in several operators that one kernel could do.  Returns the number of
    fused routers."""
    n_rewrites = 0
    for node in list(model.graph):
        if not is_experts(node):
            continue
        chosen, (share, _) = producer(node.inputs[1], "TopK"), unscaled(node.inputs[2])
        share = before_scales(share, node.inputs[1])
        found = router_of(chosen, share) if chosen is not None and share is not None else None
        if found is None or not found.fits or chosen is None or share is None:
            continue
        inputs = [found.x, *([found.bias] if found.bias is not None else [])]
        shares, index = emit(chosen, f"llmc.{found.name}", inputs, n_results=2, **found.settings)
        replace(share, shares)
        replace(chosen.outputs[1], index)
        n_rewrites += 1
    return n_rewrites


def before_scales(share: ir.Value | None, index: ir.Value | None) -> ir.Value | None:
    """The shares before each was multiplied by its expert's scale, a constant [E] looked up by the same index."""
    scaled = producer(share, "Mul")
    for shares, scale in (scaled.inputs, scaled.inputs[::-1]) if scaled is not None else ():
        looked_up = producer(scale, "Gather")
        if looked_up is not None and looked_up.inputs[1] is index and constant(looked_up.inputs[0]) is not None:
            return shares
    return share


def router_of(chosen: ir.Node, share: ir.Value) -> Router | None:
    """The router that makes the indices of a TopK and these shares; None where no kernel does what is done here."""
    count = ints(chosen.inputs[1])
    if not count or not takes_largest(chosen):
        return None
    settings: dict[str, Any] = {"k": count[0]}
    if (x := of_logits(chosen, share)) is not None:
        return Router(x, "Softmax", None, True, {**settings, "least": 0.0})
    shares, least = normalised(share)
    better = chosen.inputs[0]
    if groups := producer(better, "llmc.KeepGroups"):
        settings |= {name: attribute(groups, name) for name in GROUPS}
        better = groups.inputs[0]
    scores, bias = biased(better)
    made = producer(scores, "Softmax", "Sigmoid")
    if made is None or not is_score(made) or shares is None or not is_chosen(shares, chosen, made.outputs[0]):
        return None
    settings |= {} if least is None else {"least": least}
    x = made.inputs[0]
    return Router(x, made.op_type, bias, least is not None, settings) if x is not None else None


def of_logits(chosen: ir.Node, share: ir.Value) -> ir.Value | None:
    """x, where the shares are the softmax of the largest of x."""
    softmax = producer(share, "Softmax")
    if softmax is None or softmax.inputs[0] is not chosen.outputs[0] or not is_score(softmax):
        return None
    return chosen.inputs[0]


def normalised(share: ir.Value) -> tuple[ir.Value | None, float | None]:
    """The shares before they are divided by their sum, and the least that this sum counts as; None, if they are not."""
    quotient = producer(share, "Div")
    if quotient is None:
        return share, None
    shares, total = quotient.inputs
    least = 0.0
    if clipped := producer(total, "Clip"):
        limit = number(clipped.inputs[1]) if len(clipped.inputs) == 2 else None
        if limit is None:
            return None, None
        total, least = clipped.inputs[0], limit
    added = producer(total, "ReduceSum")
    if added is None or added.inputs[0] is not shares or ints(added.inputs[1]) not in ([1], [-1]):
        return None, None
    return (shares, least) if attribute(added, "keepdims", 1) else (None, None)


def biased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores, and a constant [E] that is added to them."""
    added = producer(value, "Add")
    for scores, bias in (added.inputs, added.inputs[::-1]) if added is not None else ():
        if constant(bias) is not None and dims(bias) == dims(scores)[-1:]:
            return scores, bias
    return value, None


def is_score(node: ir.Node) -> bool:
    return node.op_type == "Sigmoid" or is_last_axis(node, attribute(node, "axis", -1))


def is_chosen(shares: ir.Value, chosen: ir.Node, scores: ir.Value) -> bool:
    """Whether the shares are the scores where the TopK found the largest."""
    if shares is chosen.outputs[0]:
        return chosen.inputs[0] is scores
    looked_up = producer(shares, "GatherElements")
    if looked_up is None or not is_last_axis(looked_up, attribute(looked_up, "axis", 0)):
        return False
    return list(looked_up.inputs) == [scores, chosen.outputs[1]]

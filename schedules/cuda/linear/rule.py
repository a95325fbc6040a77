"""Linear layers on a GPU, for every M: which kernels, in which order.

    [norm]          a launch of its own where the product cannot do it: x' in tiles (norm.py)
    product         GEMV (gemv.py) or GEMM (gemm.py): the parameters say which

Up to 16 tokens both are there.  Of many weights in bf16 and f16 Hopper's GEMM is the faster at every M (measured on an
H200), of few or quantised ones, and elsewhere, the GEMV; match chooses so, and what is measured may choose otherwise.
Weights in f32 have a GEMM alone.  Where a norm is deferred (deferred_norm.py), both products are of one family, and no
measurement decides which: what one hands on is what the other takes.

The operators: call.py.  Every kernel reads the one layout that a weight has (gemv_weight.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from llmc.compiler.kernel import FEW_ROWS, Call, Implementation, Launch, Operand, RowMajor, TensorType
from llmc.compiler.target import Target
from llmc.schedules.cuda import norm as norms
from llmc.schedules.cuda.deferred_norm import by_gemv, settled
from llmc.schedules.cuda.linear import gemm, gemv
from llmc.schedules.cuda.linear.call import LinearOp, parse
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from llmc.schedules.rule import Rule

Params = Gemv | Tiling

LEAST_STREAMED = 12 << 20
"""Weights of a product that has enough of them for the GEMM's rings to pay at few tokens: of 16 million (33 MB) an H200
takes 9.8 µs by GEMM and 10.3 by GEMV, of more the GEMM is ahead by more."""


def match(call: Call, target: Target) -> Params | None:
    op = parse(settled(call, target))
    if op is None or not can_append(op, target):
        return None
    if prefers_gemv(op, target):
        return gemv.default_params(product_of(op, target, by_gemv=True), target)
    return gemm.default_params(product_of(op, target, by_gemv=False), target)


def space(call: Call, target: Target) -> Iterable[Params]:
    """Parameters worth measuring, the best on paper first; where both families can, some of each before the rest."""
    op = parse(settled(call, target))
    if op is None:
        return ()
    if not takes_gemv(op):
        return gemm.space(product_of(op, target, by_gemv=False), target)
    inside = product_of(op, target, by_gemv=True)
    streams: list[Params] = [*gemv.space(inside, target)]
    if op.deferred or op.moments:
        return streams
    tiles: list[Params] = [*gemm.space(product_of(op, target, by_gemv=False), target)]
    if not prefers_gemv(op, target):
        return [*tiles[:2], *streams[:2], *tiles[2:], *streams[2:]]
    apart = [replace(params, apart=True) for params in gemv.space(stripped(op), target)[:2]] if inside.norm else []
    return [*streams[:2], *tiles[:1], *apart[:1], *tiles[1:2], *streams[2:], *apart[1:], *tiles[2:]]


def can_append(op: LinearOp, target: Target) -> bool:
    """Whether a product that appends can do it: a prompt's, by `wgmma`, into a cache of what it multiplies."""
    if op.append is None:
        return True
    takes = DEVICES[target.arch].wgmma and op.element != "f32"
    return takes and op.m > FEW_ROWS and op.append.kv_dtype == op.element


def takes_gemv(op: LinearOp) -> bool:
    """Whether the GEMV can execute it."""
    if op.deferred or op.moments:
        return by_gemv(op.m, op.weight)
    return op.element != "f32" and op.m <= gemv.MOST_TOKENS


def prefers_gemv(op: LinearOp, target: Target) -> bool:
    """Whether it is the choice where nothing was measured."""
    is_streamed = DEVICES[target.arch].wgmma and op.weight == op.element and op.rows * op.k >= LEAST_STREAMED
    return takes_gemv(op) and not is_streamed


def product_of(op: LinearOp, target: Target, *, by_gemv: bool, apart: bool = False) -> LinearOp:
    """The product's own part of the op: what is left when x has been normalised or brought to tiles in front of it.
    apart: a norm is in front although the GEMV could take it."""
    if op.deferred:
        return op
    if by_gemv and not (apart and op.norm):
        inside = gemv.takes_norm(op, target) or (op.tiled_x and not op.norm)
        return op if inside else stripped(op)
    return stripped(op)


def stripped(op: LinearOp) -> LinearOp:
    """What is left of the op behind a launch that normalises x, and writes it as it is multiplied."""
    return replace(op, norm="", epsilon=0.0, tiled_x=op.element != "f32")


def implement(call: Call, params: Params, target: Target) -> Implementation:
    executed = settled(call, target)
    implementation = implement_settled(executed, params, target)
    return implementation if executed.op == call.op else replace(implementation, op=executed.op)


def implement_settled(call: Call, params: Params, target: Target) -> Implementation:
    """The implementation of a call whose norms are deferred just if it says so."""
    op = parse(call)
    assert op is not None, "implement follows match"
    product = product_of(op, target, by_gemv=isinstance(params, Gemv), apart=isinstance(params, Gemv) and params.apart)
    name = call.op.removeprefix("llmc.").removeprefix("RMSNorm").removeprefix("LayerNorm")
    vectors = call.inputs[op.weight_input + 1 :]
    weight = TensorType((op.rows, op.k), product.weight, constant=True, group=product.group)
    left = Call(f"llmc.{name}", (x_type(product), weight, *vectors), call.outputs)
    inner = call if product == op or op.deferred else left
    if isinstance(params, Gemv):
        implementation = gemv.implement(inner, product, params, target)
    else:
        implementation = gemm.implement(inner, product, params, target)
    if (product.norm, product.tiled_x) != (op.norm, op.tiled_x):
        implementation = behind_norm(op, product, implementation)
    return implementation


def x_type(product: LinearOp) -> TensorType:
    return TensorType((product.m, product.k), product.element if product.tiled_x else "f32", tiled=product.tiled_x)


def behind_norm(op: LinearOp, product: LinearOp, implementation: Implementation) -> Implementation:
    """The product's launches behind the one that makes its x, which becomes the first temporary."""
    x = x_type(product)
    kind: Literal["none", "rms", "layer"] = op.norm or "none"
    norm = norms.Norm(op.m, op.k, kind, bias=kind == "layer", epsilon=op.epsilon, y=x.dtype)
    inputs = [Operand("input", index) for index in range(op.weight_input)]
    front = norms.launch(norm, [*inputs, Operand("temp", 0)])

    further = {"input": op.weight_input - 1, "temp": 1}
    moved = {Operand("input", 0): Operand("temp", 0)}
    launches = [reread(launch, moved, further) for launch in implementation.launches]
    layouts = {index + op.weight_input - 1: layout for index, layout in implementation.layouts.items()}
    return replace(
        implementation,
        launches=(front, *launches),
        temps=(x.n_bytes, *implementation.temps),
        layouts={**{index: RowMajor("f32") for index in range(1, op.weight_input)}, **layouts},
    )


def reread(launch: Launch, moved: Mapping[Operand, Operand], further: Mapping[str, int]) -> Launch:
    """The launch with operands that are elsewhere: where `moved` says, or so many indices further on."""

    def place(operand: Operand) -> Operand:
        return moved.get(operand, Operand(operand.kind, operand.index + further.get(operand.kind, 0)))

    return replace(launch, operands=tuple(map(place, launch.operands)))


RULES = (Rule("linear", match, implement, space),)

"""Mixtures of experts on a GPU, for every M: which kernels.

    GEMV            up to 16 tokens: each chosen expert's weights stream by once (gemv.py)
    grouped GEMM    pairs of a token and an expert, sorted by expert (gemm.py)

Weights lie as those of linear layers, one expert behind the other, whatever M is, and only those of experts that have
tokens are read.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target
from llmc.schedules.cuda.experts import gemm, gemv
from llmc.schedules.cuda.experts.call import parse
from llmc.schedules.cuda.experts.gemm import Grouped
from llmc.schedules.cuda.experts.gemv import Streamed
from llmc.schedules.rule import Rule

Params = Streamed | Grouped


def match(call: Call, target: Target) -> Params | None:
    return next(iter(space(call, target)), None)


def space(call: Call, target: Target) -> Iterable[Params]:
    """Parameters worth measuring, the best on paper first: where both ways can, streams before tiles."""
    op = parse(call)
    return [*gemv.space(op, target), *gemm.space(op, target)] if op else ()


def implement(call: Call, params: Params, target: Target) -> Implementation:
    op = parse(call)
    assert op is not None, "implement follows match"
    if isinstance(params, Streamed):
        return gemv.implement(op, params, target)
    return gemm.implement(op, params, target)


RULES = (Rule("experts", match, implement, space),)

"""Linear layers with int4 weights: an f16 scale for each output and group of 32 or 128 along K, and x in int8 with
one for each row and group.

Bytes: N K / 2 + 2 N K / group.  A word of the weight is taken apart into two of bytes, which multiply as in int8.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target
from llmc.schedules.cpu import quant_linear
from llmc.schedules.cpu.linear import Tiles
from llmc.schedules.rule import Rule


def match(call: Call, target: Target) -> Tiles | None:
    quant = quant_linear.parse(call, target, "i4")
    return quant_linear.default_tiles(quant, target) if quant else None


def space(call: Call, target: Target) -> Iterable[Tiles]:
    quant = quant_linear.parse(call, target, "i4")
    return quant_linear.space(quant, target) if quant else ()


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    quant = quant_linear.parse(call, target, "i4")
    assert quant is not None, "implement follows match"
    return quant_linear.implement(quant, tiles, call)


RULES = (Rule("linear_int4", match, implement, space),)

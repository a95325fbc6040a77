"""Linear layers with int8 weights: a scale for each output, x in int8 with a scale for each row and block of 128.

Bytes: N K + 4 N.  With VNNI four products a lane and instruction; without it, widened to 16 bits: right, not fast.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmc.compiler.kernel import Call, Implementation
from llmc.compiler.target import Target
from llmc.schedules.cpu import quant_linear
from llmc.schedules.cpu.linear import Tiles
from llmc.schedules.rule import Rule


def match(call: Call, target: Target) -> Tiles | None:
    quant = quant_linear.parse(call, target, "i8")
    return quant_linear.default_tiles(quant, target) if quant else None


def space(call: Call, target: Target) -> Iterable[Tiles]:
    quant = quant_linear.parse(call, target, "i8")
    return quant_linear.space(quant, target) if quant else ()


def implement(call: Call, tiles: Tiles, target: Target) -> Implementation:
    quant = quant_linear.parse(call, target, "i8")
    assert quant is not None, "implement follows match"
    return quant_linear.implement(quant, tiles, call)


RULES = (Rule("linear_int8", match, implement, space),)

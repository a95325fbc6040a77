"""Rotary embedding by pairs (2i, 2i + 1), as Cohere, GLM, ERNIE and Helium spell it out: what `fuse_rotary` asks of it.

    Add(Mul(x, C), Mul(Reshape(Concat([-x[…, 1::2]], [x[…, 0::2]])), S))
    C = twice(Cos(f)), Cos(twice(f)), Unsqueeze(twice(w), 1) or twice(Cos(Concat(f, f))[…, :RD/2]), S alike

where twice, an Expand and a Reshape, has each element twice in a row.  And as DeepSeek has it, which turns pairs and
leaves the first of each in front of the second of each:

    Concat(a C - b S, b C + a S)      a = x[…, ::2], b = x[…, 1::2], C and S [B, 1, S, RD/2]

or as a product of complex numbers has it, which leaves pairs where they are:

    Reshape(Concat([a C - b S], [b C + a S]))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import onnx_ir as ir

from llmc.compiler.graph import attribute, emit, is_last_axis, number, producer
from llmc.compiler.graph.shapes import dims, ints
from llmc.passes.slices import first_part, paired, part_of, size_of

Make: TypeAlias = Callable[[ir.Node], ir.Value]
"""Puts the nodes of a value in front of a node."""
Waves: TypeAlias = tuple[ir.Value, Make]
"""Cosines or sines: the value that they were found in, and how to get them [B, S, RD/2]."""


def rotate_pairs(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is x with each pair (a, b) of its last axis replaced by (-b, a)."""
    joined = producer(value, "Reshape")
    pairs = producer(joined.inputs[0] if joined else None, "Concat")
    if value is None or pairs is None or len(pairs.inputs) != 2 or not is_last_axis(pairs, attribute(pairs, "axis")):
        return None
    odd, even = (column(operand) for operand in pairs.inputs)
    negated = producer(odd, "Neg")
    x = paired(even, negated.inputs[0] if negated else None)
    return x if x is not None and dims(value) == dims(x) else None


Parts: TypeAlias = tuple[ir.Value, ir.Value, ir.Value, ir.Value]


def turned_parts(first: ir.Value | None, second: ir.Value | None) -> Parts | None:
    """a, b, and the C and S [B, S, RD/2] that they are turned by, of a C - b S and b C + a S; of heads [B, H, S, RD/2]
    or [B, S, H, RD/2]."""
    one, other = producer(first, "Sub"), producer(second, "Add")
    if one is None or other is None or len(dims(first)) != 4:
        return None
    products = [producer(value, "Mul") for value in (*one.inputs, *other.inputs)]
    operands = [tuple(node.inputs) for node in products if node is not None]
    if len(operands) != 4:
        return None
    (a, c), (b, s), *rest = operands
    axis = heads_axis(first)
    cos, sin = unsqueezed(c, axis), unsqueezed(s, axis)
    if rest != [(b, c), (a, s)] or a is None or b is None or cos is None or sin is None:
        return None
    return a, b, cos, sin


def heads_axis(value: ir.Value | None) -> int:
    """1 of [B, H, S, D], 2 of [B, S, H, D]."""
    return 1 if isinstance(dims(value)[1], int) else 2


class TurnedPairs(NamedTuple):
    """The first and the second of each pair of x [B, H, S, RD], or [B, S, H, RD]; cosines and sines [B, S, RD/2]."""

    x: ir.Value
    halves: list[ir.Value]
    cos: ir.Value
    sin: ir.Value


def turned_pairs(first: ir.Value | None, second: ir.Value | None) -> TurnedPairs | None:
    """The pairs turned by a C - b S and b C + a S, where a and b are every second element of one value."""
    found = turned_parts(first, second)
    x = paired(*found[:2]) if found is not None else None
    if found is None or x is None:
        return None
    a, b, cos, sin = found
    return TurnedPairs(x, [a, b], cos, sin)


def pairs_in_place(joined: ir.Node) -> TurnedPairs | None:
    """What a Reshape(Concat([a C - b S], [b C + a S])) turns, whose pairs are where they were."""
    pairs = producer(joined.inputs[0], "Concat")
    if pairs is None or len(pairs.inputs) != 2 or not is_last_axis(pairs, attribute(pairs, "axis")):
        return None
    match = turned_pairs(*(column(value) for value in pairs.inputs))
    return match if match is not None and dims(match.x) == dims(joined.outputs[0]) else None


def column(value: ir.Value | None) -> ir.Value | None:
    """x, if the value is x with one more axis of 1 behind the others."""
    node = producer(value, "Unsqueeze")
    if node is None or node.inputs[0] is None:
        return None
    return node.inputs[0] if ints(node.inputs[1]) in ([-1], [len(dims(node.inputs[0]))]) else None


def twice(value: ir.Value | None) -> ir.Value | None:
    """y [..., n], if the value [..., 2n] has each of its elements twice in a row."""
    joined = producer(value, "Reshape")
    repeated = producer(joined.inputs[0] if joined else None, "Expand")
    y = column(repeated.inputs[0]) if repeated is not None else None
    if value is None or repeated is None or y is None:
        return None
    *outer, n = dims(y)
    same = dims(repeated.outputs[0]) == (*outer, n, 2) and dims(value) == (*outer, 2 * size_of(y))
    return y if same else None


def waves_by_pairs(value: ir.Value | None, function: str, axis: int = 1) -> Waves | None:
    """The cosines or sines of which the value [B, 1, S, RD] has each twice in a row: function(f), perhaps
    scaled.  axis: that of the 1."""
    once = twice(value)
    make = before_heads(once, axis) if once is not None else before_twice(value, function, axis)
    return (value, make) if value is not None and make is not None else None


def before_heads(value: ir.Value, axis: int) -> Make | None:
    """w [B, S, n] of Unsqueeze(w, 1), or of its first half along the last axis."""
    x, start, stop = part_of(value) or (value, 0, size_of(value))
    waves = unsqueezed(x, axis)
    if waves is None or start != 0:
        return None
    return lambda before: waves if stop == size_of(waves) else first_part(before, waves, stop)


def before_twice(value: ir.Value | None, function: str, axis: int) -> Make | None:
    """w, if the value is Unsqueeze(twice(w), 1); function(f), if it is Unsqueeze(function(twice(f)), 1): a scale of the
    latter is kept."""
    value = unsqueezed(value, axis)
    if (waves := twice(value)) is not None:
        return lambda _: waves
    scaled = producer(value, "Mul")
    scale = scaled.inputs[1] if scaled is not None and number(scaled.inputs[1]) is not None else None
    wave = producer(scaled.inputs[0] if scaled is not None and scale is not None else value, function)
    angles = twice(wave.inputs[0]) if wave is not None else None
    if angles is None:
        return None

    def make(before: ir.Node) -> ir.Value:
        waves = emit(before, function, [angles])[0]
        return waves if scale is None else emit(before, "Mul", [waves, scale])[0]

    return make


def unsqueezed(value: ir.Value | None, axis: int = 1) -> ir.Value | None:
    """w [B, S, n] of Unsqueeze(w, axis) [B, 1, S, n] or [B, S, 1, n]."""
    node = producer(value, "Unsqueeze")
    return node.inputs[0] if node is not None and ints(node.inputs[1]) == [axis] else None

"""What adapters add to a model's weights, when they stay beside them: two thin matrices for each.

A weight of the graph may be several of the model's, joined, turned or with its rows in another order: what is added to
it then is made of the same parts in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from llmc.compiler.weights import Array, Weight

RANKS = 8
"""A rank is filled up with zeros to a multiple of this."""


@dataclass(frozen=True)
class Factors:
    """What one adapter adds to one weight [N, K]: b a, with a [r, K] and b [N, r], the adapter's scale in b."""

    a: Weight
    b: Weight

    @property
    def rank(self) -> int:
        return self.a.dims[0]


Added: TypeAlias = Mapping[str, Sequence[Factors | None]]
"""By the name of one of the model's weights what each adapter adds to it, in the adapters' order; None: nothing."""


@dataclass(frozen=True)
class Part:
    """Rows of a weight of the graph that are one of the model's.  name: of that; rows: which of its rows, None for all
    in order; n_rows: how many."""

    name: str
    n_rows: int
    rows: Array | None = None


def parts_of(weight: Weight) -> list[Part] | None:
    """What the rows of a weight [N, K] are, from the first on; None where that isn't known."""
    match weight.made_of:
        case ():
            return [Part(str(weight.name), weight.dims[0])]
        case ("turned", Weight() as turned) if not turned.made_of:
            return [Part(str(turned.name), weight.dims[0])]
        case ("rows", bytes() as chosen, Weight() as whole):
            return chosen_parts(parts_of(whole), np.frombuffer(chosen, np.int64))
        case ("concat", 0, *weights):
            found = [parts_of(each) for each in weights if isinstance(each, Weight)]
            known = [parts for parts in found if parts is not None]
            return [part for parts in known for part in parts] if len(known) == len(weights) else None
    return None


def chosen_parts(parts: list[Part] | None, chosen: Array) -> list[Part] | None:
    """The same of some of the rows of one weight of the model."""
    if parts is None or len(parts) != 1:
        return None
    (part,) = parts
    rows = chosen if part.rows is None else part.rows[chosen]
    return [Part(part.name, len(chosen), rows)]


def joined_factors(weight: Weight, parts: Sequence[Part], added: Added) -> tuple[Weight, Weight]:
    """a [E, P·r, K] and b [E, N, r] of a weight of these P parts, for E adapters; r: the largest rank, filled up."""
    of_parts = [added.get(part.name) for part in parts]
    n_adapters = next(len(each) for each in of_parts if each is not None)
    ranks = [factors.rank for each in of_parts for factors in each or () if factors is not None]
    rank = -(-max(ranks) // RANKS) * RANKS
    n_rows, n_columns = weight.dims

    def placed() -> Iterator[tuple[int, int, int, Part, Factors]]:
        """The adapter, the part, where that begins, and what is added."""
        for adapter in range(n_adapters):
            start = 0
            for number, (part, each) in enumerate(zip(parts, of_parts, strict=True)):
                if each is not None and (factors := each[adapter]) is not None:
                    yield adapter, number, start, part, factors
                start += part.n_rows

    def read_a() -> Array:
        a = np.zeros((n_adapters, len(parts) * rank, n_columns), np.float32)
        for adapter, number, _, _, factors in placed():
            a[adapter, number * rank : number * rank + factors.rank] = factors.a.unrounded()
        return a

    def read_b() -> Array:
        b = np.zeros((n_adapters, n_rows, rank), np.float32)
        for adapter, _, start, part, factors in placed():
            rows = factors.b.unrounded()
            rows = rows if part.rows is None else rows[part.rows]
            b[adapter, start : start + part.n_rows, : factors.rank] = rows
        return b

    name, stored = weight.name, weight.stored_dtype
    made_of = ("adapters", weight)
    return (
        Weight.computed(f"{name}.lora_a", (n_adapters, len(parts) * rank, n_columns), read_a, stored, (*made_of, "a")),
        Weight.computed(f"{name}.lora_b", (n_adapters, n_rows, rank), read_b, stored, (*made_of, "b")),
    )

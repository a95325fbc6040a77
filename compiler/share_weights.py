"""Programs for several targets over one weights section: what lies alike for several is stored once.

The layouts that a constant has lie side by side, so that it is read, and quantised, once for all of them:

    cuda:sm_90a    w in tiles,  norm
    cuda:sm_80     w in tiles,  norm     -->   w in tiles | w in panels | norm
    cpu            w in panels, norm
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmc.compiler.memory import aligned
from llmc.compiler.placement import WEIGHT_ALIGNMENT
from llmc.compiler.plan import PlacedWeight, PlannedCall, Program
from llmc.compiler.quantization.quantize import QuantizedWeight
from llmc.runtime.format import SPACES

WEIGHTS = SPACES.index("weights")


@dataclass(frozen=True)
class SharedWeights:
    """The weights section.  placed: by offset.  users: of each, the programs that read it, by number."""

    placed: tuple[PlacedWeight, ...]
    users: tuple[tuple[int, ...], ...]
    n_bytes: int

    def bytes_by_users(self) -> dict[tuple[int, ...], int]:
        """How many bytes only these programs read, for each set of programs."""
        found: dict[tuple[int, ...], int] = {}
        for placed, users in zip(self.placed, self.users, strict=True):
            found[users] = found.get(users, 0) + placed.n_bytes
        return found


def share_weights(programs: Sequence[Program]) -> tuple[list[Program], SharedWeights]:
    """The programs with their weights placed in one section, and that section.  One program stays as it is.

    Programs come from one source model: a constant is the same where its tensor is, or what it was quantised from.
    """
    if len(programs) == 1:
        (program,) = programs
        return [program], SharedWeights(program.weights, ((0,),) * len(program.weights), program.weight_bytes)
    found: dict[Hashable, dict[Hashable, tuple[PlacedWeight, list[int]]]] = {}
    for number, program in enumerate(programs):
        for weight in program.weights:
            layouts = found.setdefault(constant(weight), {})
            layouts.setdefault(layout(weight), (weight, []))[1].append(number)
    places: dict[Hashable, PlacedWeight] = {}
    users: list[tuple[int, ...]] = []
    end = 0
    for key, layouts in found.items():
        (first, _), *_ = layouts.values()
        for how, (weight, readers) in layouts.items():
            places[key, how] = replace(weight, value=first.value, offset=end)
            users.append(tuple(readers))
            end += aligned(weight.n_bytes, WEIGHT_ALIGNMENT)
    moved = [move(program, [places[constant(w), layout(w)] for w in program.weights]) for program in programs]
    return moved, SharedWeights(tuple(places.values()), tuple(users), end)


def constant(weight: PlacedWeight) -> Hashable:
    """What tells a constant from all others, in whichever graph it stands."""
    tensor: Any = weight.value.const_value
    return (id(tensor.source), tensor.scheme) if isinstance(tensor, QuantizedWeight) else id(tensor)


def layout(weight: PlacedWeight) -> Hashable:
    return str(weight.layout), weight.n_bytes


def move(program: Program, weights: Sequence[PlacedWeight]) -> Program:
    """The program with its weights at other places."""
    places = {old.offset: new.offset for old, new in zip(program.weights, weights, strict=True)}
    plans = tuple(replace(plan, calls=tuple(move_call(call, places) for call in plan.calls)) for plan in program.plans)
    return replace(program, plans=plans, weights=tuple(weights))


def move_call(call: PlannedCall, places: Mapping[int, int]) -> PlannedCall:
    arguments = tuple(a._replace(offset=places[a.offset]) if a.space == WEIGHTS else a for a in call.arguments)
    return replace(call, arguments=arguments)

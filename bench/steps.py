"""How long decode steps of llmc take, by the tokens that reach the host."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import pairwise

from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.sequence import Sequence


def step_seconds(model: Model, sequences: Iterable[Sequence], n_steps: int) -> list[float]:
    """Seconds of each of so many greedy steps of sequences that have logits: their tokens are chosen, reach the host,
    and are appended.

    Where the model runs ahead it is the time from the arrival of one step's tokens to that of the next one's, which
    nothing but steps can fill: the first arrival is not timed, the last step's tokens are waited for.
    """
    turn = [(sequence, GREEDY) for sequence in sequences]
    if not model.runs_ahead:
        return [seconds_of_one(model, turn) for _ in range(n_steps)]
    arrivals = []
    for _ in range(n_steps):
        model.advance(turn)
        arrivals.append(time.perf_counter())
    model.sample(turn)
    arrivals.append(time.perf_counter())
    return [after - before for before, after in pairwise(arrivals)]


def seconds_of_one(model: Model, turn: list[tuple[Sequence, How]]) -> float:
    """Seconds of one step, from end to end."""
    began = time.perf_counter()
    chosen = model.sample(turn)
    model.step([(sequence, [token]) for (sequence, _), token in zip(turn, chosen, strict=True)])
    return time.perf_counter() - began

"""The search for the fastest parameters of one call.

    heats    the rule's own choice against candidates, a few at a time: first those that are best on paper, then those
             that differ least from the fastest so far
    final    the rule's own choice, the fastest and the next, with more samples; they decide

The machine is noisy, so everything compared is measured in turns, samples during which a thread lost its processor are
left out, and another choice than the rule's own must be clearly faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Protocol

from llmc.compiler.kernel import Call
from llmc.schedules.records import Signature
from llmc.schedules.rule import Rule
from llmc.schedules.tuning.bench import Sample

HEAT, HEAT_ROUNDS = 4, 7
FINAL_ROUNDS = 21
MOST = 16
"""The most candidates that are measured for one call, if there is time."""
BETTER = 0.97
"""Another choice must take less than this part of the time of the rule's own, or that stays."""
MOSTLY = 2 / 3
"""The other choice must be faster in this part of the rounds."""
FEWEST = 3
"""Clean samples that a median needs; with fewer, all samples are taken."""


@dataclass(frozen=True)
class Job:
    """A call to tune.  space: the parameters to choose from, the most promising first."""

    signature: Signature
    call: Call
    rule: Rule
    default: Any
    space: Sequence[Any]


class Measure(Protocol):
    """Samples of each candidate, and of each limit of the machine: how long it alone would let the call take."""

    def __call__(
        self, candidates: Sequence[Any], n_rounds: int
    ) -> tuple[list[list[Sample]], Mapping[str, list[Sample]]]: ...


@dataclass(frozen=True)
class Found:
    """The choice.

    ns: of one call.  limit, share: what bounds the call, and the part of its time that the limit alone would need.
    default_ratio: how many times longer the rule's own choice takes; beat, beat_ratio: so with the fastest of the
    others, if any.  All ratios are medians over rounds, and may differ from ratios of medians.
    """

    params: Any
    ns: float
    limit: str
    share: float
    default_ratio: float
    beat: Any | None
    beat_ratio: float
    tried: int
    clean: float


def search(job: Job, measure: Measure, out_of_time: Callable[[], bool], most: int = MOST) -> Found:
    """The fastest parameters for a call.  Asks `out_of_time` between heats; the final is always held."""
    relative = {job.default: 1.0}  # times, as multiples of the default's
    fastest = job.default
    while len(relative) < most and not out_of_time():
        heat = entrants(job, relative, fastest, len(relative) > most // 2)[: min(HEAT, most - len(relative))]
        if not heat:
            break
        samples, _ = measure([fastest, *heat], HEAT_ROUNDS)
        relative |= {p: relative[fastest] * ratio(s, samples[0]) for p, s in zip(heat, samples[1:], strict=True)}
        fastest = min(relative, key=lambda params: relative[params])
    others = sorted((p for p in relative if p != job.default), key=lambda params: relative[params])
    return final([job.default, *others[:2]], measure, len(relative))


def entrants(job: Job, tried: Mapping[Any, float], fastest: Any, nearby: bool) -> list[Any]:
    """Candidates not yet measured, in the order to measure them: on paper, or `nearby` the fastest."""
    untried = [params for params in job.space if params not in tried]
    return sorted(untried, key=lambda params: differences(params, fastest)) if nearby else untried


def differences(one: Any, other: Any) -> int:
    """The number of fields in which two parameters differ."""
    return sum(getattr(one, f.name) != getattr(other, f.name) for f in fields(one))


def final(finalists: Sequence[Any], measure: Measure, tried: int) -> Found:
    """Decides among the rule's own choice, the first, and others."""
    samples, limits = measure(finalists, FINAL_ROUNDS)
    order = sorted(range(len(finalists)), key=lambda i: ratio(samples[i], samples[0]))
    best = order[0] if clearly_faster(samples[order[0]], samples[0]) else 0
    rest = next((i for i in order if i != best), None)
    shares = {name: ratio(alone, samples[best]) for name, alone in limits.items()}
    limit = max(shares, key=lambda name: shares[name])
    everything = [sample for part in (*samples, *limits.values()) for sample in part]
    return Found(
        params=finalists[best],
        ns=typical(samples[best]),
        limit=limit,
        share=shares[limit],
        default_ratio=ratio(samples[0], samples[best]),
        beat=None if rest is None else finalists[rest],
        beat_ratio=0.0 if rest is None else ratio(samples[rest], samples[best]),
        tried=tried,
        clean=sum(sample.clean for sample in everything) / len(everything),
    )


def typical(samples: Sequence[Sample]) -> float:
    """The median of the clean samples in ns; of all of them when too few are clean."""
    clean = [sample.ns for sample in samples if sample.clean]
    return median(clean if len(clean) >= FEWEST else [sample.ns for sample in samples])


def ratio(samples: Sequence[Sample], others: Sequence[Sample]) -> float:
    """How many times longer the first take: the median of the rounds' ratios."""
    return median(clean_ratios(samples, others) or [a.ns / b.ns for a, b in zip(samples, others, strict=True)])


def clean_ratios(samples: Sequence[Sample], others: Sequence[Sample]) -> list[float]:
    """The ratio of each round in which both are clean; none, if these are too few to mean anything."""
    ratios = [a.ns / b.ns for a, b in zip(samples, others, strict=True) if a.clean and b.clean]
    return ratios if len(ratios) >= FEWEST else []


def clearly_faster(samples: Sequence[Sample], default: Sequence[Sample]) -> bool:
    """Whether to leave the rule's own choice for this."""
    ratios = clean_ratios(samples, default)
    return bool(ratios) and median(ratios) < BETTER and sum(r < 1 for r in ratios) >= MOSTLY * len(ratios)

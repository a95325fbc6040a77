"""Make records of what was measured in place (bench/gpu/in_place.py): candidates for one call, each run between the
other calls of a model's layer, which stay as they are.

A call may have been measured in several chains (of several models, or lengths of context).  Then only candidates that
were measured in all of them are compared, by the geometric mean of their ratios to the rule's own choice.  A chain that
was cut off counts only if no other chain has the call.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field

from llmc.schedules.records import Record, Signature, signature_of
from llmc.schedules.tuning.limits import geometric_mean, limit_of, needed_us
from llmc.schedules.tuning.lines import BEST, CANDIDATE, OWN, Entry

LEAST_GAIN = 0.005
"""Another choice than the rule's own must save at least this part of a layer's time."""


def is_better(us: float, base_us: float, noise: float) -> bool:
    """Whether a layer of `us` is clearly faster than one of base_us.  noise: by which share the latter varies."""
    return us < (1 - max(LEAST_GAIN, noise)) * base_us


@dataclass
class Call:
    """A call that was measured in place.  own: what the rule chooses.  tried: of each candidate, by its parameters as
    JSON, the line of each chain."""

    own: Entry
    tried: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def ranked(self, finished: Set[str]) -> list[list[Entry]]:
        """The lines of each candidate that was measured in every chain that counts, the fastest first.  finished:
        chains that were not cut off."""
        n_tried = Counter(chain for entries in self.tried.values() for chain in entries)
        most = max(n_tried.values(), default=0)
        chains = set(n_tried) & finished or {chain for chain, n in n_tried.items() if n == most}
        complete = [entries for entries in self.tried.values() if chains <= set(entries)]
        return sorted(([entries[chain] for chain in sorted(chains)] for entries in complete), key=ratio)


def ratio(entries: Iterable[Entry]) -> float:
    """The ratio of a candidate's time to that of the rule's own choice, all else the same."""
    return geometric_mean(entry["us"] / max(entry["base_us"], 1e-6) for entry in entries)


def records_in_place(
    entries: Iterable[Entry], machine: str, rates: Mapping[str, float], version: str
) -> Iterator[Record]:
    """A record for each call of which candidates were measured in place, with its chains' times a layer; none without
    limits.  entries: lines of the stage, checked."""
    by: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by[entry["of"]].append(entry)
    chains = {entry["chain"]: entry for entry in by[OWN]}
    best = {entry["chain"]: entry for entry in by[BEST]}
    calls: dict[Signature, Call] = {}
    for entry in by[OWN]:
        for call in entry["calls"]:
            calls.setdefault(signature_of(call["signature"]), Call(call))
    for entry in by[CANDIDATE]:
        if entry["chain"] in chains:
            call = calls.get(signature_of(entry["signature"]))
            params = json.dumps(entry["params"], sort_keys=True)
            if call:
                call.tried.setdefault(params, {})[entry["chain"]] = entry
    for signature, call in calls.items():
        if rates and (ranked := call.ranked(set(best))):
            yield record_of(signature, call, ranked, Measured(machine, rates, version, chains, best))


@dataclass(frozen=True)
class Measured:
    """What a run says of all calls.  chains: the line of each with the rules' own choices; best: with the best ones."""

    machine: str
    rates: Mapping[str, float]
    version: str
    chains: Mapping[str, Entry]
    best: Mapping[str, Entry]

    def refutes(self, entries: Iterable[Entry]) -> bool:
        """Whether a chain with this candidate, and the best of its other calls, was no faster than with the rules'
        own."""
        for entry in entries:
            found = self.best.get(entry["chain"])
            if found and found["choice"].get(entry["job"]) == entry["index"] and found["us"] >= found["own_us"]:
                return True
        return False


def record_of(signature: Signature, call: Call, ranked: list[list[Entry]], run: Measured) -> Record:
    """The record of the fastest candidate, or of the rule's own choice where none is clearly faster."""
    first = ranked[0]
    noise = sum(entry["noise"] for entry in first) / len(first)
    wins = is_better(ratio(first), 1.0, noise) and not run.refutes(first)
    base_us = geometric_mean(entry["base_us"] for entry in first)
    us = geometric_mean(entry["us"] for entry in first) if wins else base_us
    chosen = first[0] if wins else call.own
    others = [(ratio(entries), str(entries[0]["words"])) for entries in ranked[wins:]]
    beat_ratio, beat = min([*others, *[(1.0, str(call.own["words"]))] * wins])
    names = [entry["chain"] for entry in first]
    chains = [run.chains[name] for name in names]
    limit = limit_of(chains, run.rates)
    return Record(
        signature=signature,
        rule=chosen["rule"],
        params=chosen["params"],
        time_us=round(us, 2),
        share=round(needed_us(chains, limit, run.rates) / us, 3),
        limit=limit,
        rate=round(run.rates[limit] / 1e9, 1),
        heuristic_us=round(base_us, 2),
        beat=beat,
        beat_ratio=round(beat_ratio * base_us / us, 3),
        tried=len(call.tried) + 1,
        clean=1.0,
        date=time.strftime("%Y-%m-%d", time.gmtime(max(entry["at"] for entry in first))),
        machine=run.machine,
        llmc=run.version,
        in_place=", ".join(names),
    )

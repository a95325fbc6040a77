"""How long candidates take in their places: between the other calls of a model's layers, where they overlap with those
and not with themselves.

A graph launches a chain of layers (chain.py) with the rules' own choices.  Some choices pay only where neighbours
choose likewise, as blocks that leave room for the next kernel's: so first all calls take their first candidates
together, then their second ones; then attention and the call behind it do so alone; and the fastest such chain is what
the rest begins with, if one is faster.  Then, of each call, the most expensive first, each candidate takes the own
choice's place, all others held fixed; base and candidate are replayed in turns, and the medians count.  The best joins
the others where the layer is clearly faster for it, else the own choice does, and the next call's candidates are
measured so.

What an item finds depends on which candidates won before; those are known from the journal, so that a run goes on
where it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from itertools import cycle
from statistics import median, quantiles
from typing import Any

from llmc.bench.gpu import check, measure
from llmc.bench.gpu.chain import Chain, Choice, Laid, RandomBits, chains, others
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Job, Kit
from llmc.bench.gpu.measure import MOST_LAUNCHES, First, Size
from llmc.compiler.kernel import Operand
from llmc.schedules.tuning.in_place import is_better
from llmc.schedules.tuning.lines import BEST, CANDIDATE, IN_PLACE, NEIGHBOURS, OWN, TOGETHER

STAGE = IN_PLACE
SETS = (TOGETHER, NEIGHBOURS)
FEW, MANY = 3, 8
"""Pairs of replays: of every candidate, and again of those that are no slower than the base by then."""
FAR = 1.3
"""Alone and in place differed by 9 % at most on an H200."""
LONGER = 2
"""A replay is so many times as long as one of a candidate alone: between two of them the device has nothing to do."""

Replay = Callable[[], None]


def items(kit: Kit) -> Iterator[str]:
    """Of each chain the rules' own choices, then candidates of several calls together, then those of each, then the
    best of all calls."""
    for chain in chains(kit):
        yield item(chain, OWN)
        yield from (item(chain, f"{what} #{index}") for what, index in chain.sets)
        for job in chain.jobs:
            yield from (item(chain, f"{job.name} #{index}") for index in others(job))
        if chain.jobs:
            yield item(chain, BEST)


def all_together(kit: Kit) -> set[str]:
    """Of any chain, what is said of candidates of several calls."""
    return {f"{what} #{index}" for chain in chains(kit) for what, index in chain.sets}


def together(chain: Chain, what: str, index: int, bad: Set[str]) -> dict[str, int]:
    """These calls' index-th candidates, but for bad ones."""
    having = (job for job in chain.jobs_of(what) if index in others(job))
    return {job.name: index for job in having if check.item(job, index) not in bad}


def item(chain: Chain, what: str) -> str:
    return f"{chain.name}: {what}"


def find(name: str) -> tuple[str, str, int]:
    """The chain's name, what it is about, and for a candidate the job's name and its index; else 0."""
    chain, _, what = name.partition(": ")
    job, _, index = what.rpartition(" #")
    return (chain, job, int(index)) if job else (chain, what, 0)


def known_bad(journal: Journal) -> set[str]:
    """Candidates that are known to be wrong, or far slower alone."""
    wrong = {item for stage in (check.STAGE, measure.STAGE, STAGE) for item in journal.failed(stage)}
    return {candidate_of(name) for name in wrong if find(name)[1] not in SETS} | far_slower(journal)


def usable(kit: Kit, names: Iterable[str], journal: Journal, relatives: Set[str]) -> Iterator[str]:
    """Items of chains that run, without bad candidates.  relatives: of what hung."""
    bad, failed = known_bad(journal) | relatives, journal.failed(STAGE)
    sound = {
        chain.name: chain
        for chain in chains(kit)
        if item(chain, OWN) not in failed and not any(check.item(step.job, 0) in bad for step in chain.steps)
    }
    for name in names:
        chain, what, index = find(name)
        known = chain in sound and name.partition(": ")[2] not in bad
        if known and (what not in SETS or len(together(sound[chain], what, index, bad)) > 1):
            yield name


def candidate_of(name: str) -> str:
    """The job and the index, without a chain or a length of context."""
    return re.sub(r" @\d+(?= #)", "", name.rpartition(": ")[2])


def far_slower(journal: Journal) -> set[str]:
    """Candidates that take FAR times as long as the rule's own choice alone, at every length of context."""
    alone = journal.results(measure.STAGE)
    fastest: dict[str, float] = {}
    for name, entry in alone.items():
        own = alone.get(f"{name.rpartition(' #')[0]} #0")
        if own and own["us"]:
            candidate = candidate_of(name)
            fastest[candidate] = min(fastest.get(candidate, FAR), entry["us"] / own["us"])
    return {candidate for candidate, ratio in fastest.items() if ratio >= FAR}


def begun_with(chain: Chain, known: Mapping[str, Entry]) -> dict[str, int]:
    """The fastest choice of several calls together that is clearly faster than the rules' own; else nothing."""
    names = [item(chain, f"{what} #{index}") for what, index in chain.sets]
    entries = [known[name] for name in names if name in known]
    better = [entry for entry in entries if is_better(entry["us"], entry["base_us"], entry["noise"])]
    best = min(better, key=lambda entry: float(entry["us"] / entry["base_us"]), default=None)
    return dict(best["choice"]) if best else {}


def standing(chain: Chain, job: Job, known: Mapping[str, Entry]) -> dict[str, int]:
    """What other calls than the job's have while its candidates are measured: those in front of it what won, those
    behind it what was begun with."""
    won, begun = winners(chain, known), begun_with(chain, known)
    at = chain.jobs.index(job)
    return {
        **{name: begun[name] for each in chain.jobs[at + 1 :] if (name := each.name) in begun},
        **{name: won[name] for each in chain.jobs[:at] if (name := each.name) in won},
    }


def winners(chain: Chain, known: Mapping[str, Entry]) -> dict[str, int]:
    """Of each call for which another choice than the rule's own was clearly faster, the fastest by now."""
    found: dict[str, int] = {}
    for job in chain.jobs:
        tried = {i: known.get(item(chain, f"{job.name} #{i}")) for i in others(job)}
        better = {
            index: entry["us"] / entry["base_us"]
            for index, entry in tried.items()
            if entry and is_better(entry["us"], entry["base_us"], entry["noise"])
        }
        if better:
            found[job.name] = min(better, key=lambda index: better[index])
    return found


class InPlace:
    """The chain that is being measured: its memory, and the graph of its base.  A context manager: both are given back
    at the end.  known: what was found before; bad: candidates that no other ones are to be together with."""

    def __init__(self, device: Device, kit: Kit, size: Size, known: Mapping[str, Entry], bad: Set[str]) -> None:
        self._device, self._size, self._known, self._bad = device, size, dict(known), bad
        self._kit, self._chains = kit, {chain.name: chain for chain in chains(kit)}
        self._random = RandomBits(device)
        self._laid: Laid | None = None
        self._rounds = 1
        self._base: tuple[dict[str, int], Replay] | None = None
        self._memory, self._graph = ExitStack(), ExitStack()

    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def measure(self, name: str) -> dict[str, Any]:
        """µs a layer, and what a record says besides.

        Raises ValueError where there is no room, and where a candidate gives another result than the rule's own choice.
        """
        chain_name, what, index = find(name)
        chain = self._chains[chain_name]
        laid = self._opened(chain)
        laid.clear()
        if what == OWN:
            found = self._own(laid)
        elif what == BEST:
            found = self._best(laid, winners(chain, self._known))
        elif what in SETS:
            found = self._together(laid, together(chain, what, index, self._bad))
        else:
            job = self._kit.jobs[what]
            found = self._candidate(laid, job, index, standing(chain, job, self._known))
        self._known[name] = found
        return {"chain": chain.name, **found}

    def _own(self, laid: Laid) -> dict[str, Any]:
        chain = laid.chain
        base = self._replay_of(laid, {})
        times = self._device.times_ms(base, MANY + 1)[1:]
        n_bytes, n_operations = chain.work()
        return {
            "of": OWN,
            "us": self._us(median(times)),
            "noise": noise(times),
            "layers": chain.n_layers * laid.n_copies * self._rounds,
            "bytes": n_bytes,
            "operations": n_operations,
            "calls": [{"job": job.name, **said(job, 0)} for job in chain.jobs],
        }

    def _candidate(self, laid: Laid, job: Job, index: int, others: dict[str, int]) -> dict[str, Any]:
        self._compare(laid, job, index)
        return {
            "of": CANDIDATE,
            **self._against(laid, others, {**others, job.name: index}),
            "job": job.name,
            "index": index,
            "others": others,
            **said(job, index),
        }

    def _together(self, laid: Laid, choice: dict[str, int]) -> dict[str, Any]:
        for name, index in choice.items():
            self._compare(laid, self._kit.jobs[name], index)
        return {"of": TOGETHER, **self._against(laid, {}, choice), "choice": choice}

    def _against(self, laid: Laid, others: dict[str, int], choice: Choice) -> dict[str, Any]:
        """Of a choice, and of the base that it is set against."""
        base = self._replay_of(laid, others)
        with self._device.graph(self._recorded(laid, choice)) as candidate:
            ours, theirs = in_turns(self._device, base, candidate, FEW)
            if median(theirs) <= median(ours):
                ours, theirs = in_turns(self._device, base, candidate, MANY)
        return {"us": self._us(median(theirs)), "base_us": self._us(median(ours)), "noise": noise(ours)}

    def _best(self, laid: Laid, won: Mapping[str, int]) -> dict[str, Any]:
        base = self._replay_of(laid, {})
        with self._device.graph(self._recorded(laid, won)) as best:
            ours, theirs = in_turns(self._device, base, best, MANY)
        us, own_us = self._us(median(theirs)), self._us(median(ours))
        return {"of": BEST, "us": us if won else own_us, "own_us": own_us, "choice": dict(won)}

    # -- the chain ----------------------------------------------------------------------------------------------------

    def _opened(self, chain: Chain) -> Laid:
        """The chain in memory, run once: what follows the first layers is then as large as in a model."""
        if self._laid is None or self._laid.chain is not chain:
            self._close()
            self._memory.enter_context(self._device.kept())
            laid = Laid(self._device, self._kit, chain, self._random, self._size)
            once = laid.run({})
            once()
            with self._device.graph(once) as replay:
                ms = median(self._device.times_ms(replay, FEW))
            n_launches = len(chain.steps) * laid.n_copies
            rounds = round(LONGER * self._size.shortest_ms / max(ms, 1e-3))
            self._rounds = max(1, min(rounds, MOST_LAUNCHES // n_launches))
            self._laid = laid
        return self._laid

    def _close(self) -> None:
        self._graph.close()
        self._memory.close()
        self._laid = self._base = None

    def _recorded(self, laid: Laid, choice: Choice) -> Replay:
        """A function that launches what a replay has.  Kernels are loaded by now: a recording stream can't."""
        once, rounds = laid.run(choice), self._rounds

        def record() -> None:
            for _ in range(rounds):
                once()

        return record

    def _replay_of(self, laid: Laid, choice: dict[str, int]) -> Replay:
        """The graph of a base, kept until another is asked for."""
        if self._base is None or self._base[0] != choice:
            self._graph.close()
            self._base = None
            self._base = choice, self._graph.enter_context(self._device.graph(self._recorded(laid, choice)))
        return self._base[1]

    def _us(self, ms: float) -> float:
        assert self._laid is not None
        return 1e3 * ms / (self._laid.chain.n_layers * self._laid.n_copies * self._rounds)

    def _compare(self, laid: Laid, job: Job, index: int) -> None:
        """Raises ValueError where the candidate's result is not the own choice's, of the same weights and of what the
        calls in front of it make."""
        number = max(number for number, step in enumerate(laid.chain.steps) if step.job is job)
        output, first = Operand("output", 0), First()
        for before in range(number):
            laid.step(0, before, 0)()
        for each in (0, index):
            laid.step(0, number, each)()
            first.compare(job, laid.chain.length, self._device, laid.places(0, number, job.candidates[each])[output])


def in_turns(device: Device, base: Replay, candidate: Replay, n_pairs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each replay of either, one after the other, the candidate between two of the base's."""
    turns = cycle((base, candidate))
    _, *times = device.times_ms(lambda: next(turns)(), 2 * n_pairs + 2)
    return times[1::2], times[::2]


def noise(times: Sequence[float]) -> float:
    """Which share of the median lies between the quarter that is fastest and the one that is slowest."""
    first, middle, last = quantiles(times, n=4)
    return (last - first) / middle if middle else 0.0


def said(job: Job, index: int) -> dict[str, Any]:
    """What a record says of a candidate."""
    candidate = job.candidates[index]
    return {"rule": job.rule, "words": candidate.words, "params": candidate.params, "signature": job.signature}


# -- in words ---------------------------------------------------------------------------------------------------------


def rows(kit: Kit, journal: Journal) -> Iterator[tuple[object, ...]]:
    """For each chain µs a layer with the rules' own choices and with the best, and which calls have another choice."""
    known = journal.results(STAGE)
    for chain in chains(kit):
        own, best = (known.get(item(chain, what)) for what in (OWN, BEST))
        if own:
            choice = best["choice"] if best else winners(chain, known)
            jobs = {job.name: job for job in chain.jobs}
            changed = [f"{name}: {jobs[name].candidates[i].words}" for name, i in choice.items() if name in jobs]
            own_us = best["own_us"] if best else own["us"]
            yield (
                chain.name,
                f"{own_us:.1f}",
                f"{best['us']:.1f}" if best else "",
                f"{100 * (1 - best['us'] / own_us):.1f} %" if best and own_us else "",
                "; ".join(changed),
            )

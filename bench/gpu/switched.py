"""Does a pass pay that is off until a GPU has said so (schedules/switches.py)?  A whole model with it and without it.

Two artifacts of one model, whose plans of prompts differ in that pass alone, are opened side by side, and take the same
prompts in turns.  First both are asked what comes behind the prompts: logits that differ by more than a kernel's
roundings are an error, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from llmc.schedules.switches import KEEP_BITS
from llmc.schedules.tuning.lines import SWITCHES

if TYPE_CHECKING:
    from llmc.bench.gpu.ours import Ours

STAGE = SWITCHES
LOGITS, PROMPT = "logits", "prompt"
NEW = 4
"""Tokens that both choose behind each prompt."""
MOST_ERROR = 0.05
"""Of two artifacts' logits, in their standard deviations: of the largest difference where nothing but a pass differs
that keeps the bits, else of the root of the differences' mean square.  Where x is rounded before it is divided instead
of behind, that is 0.006 in a model of 1024 columns and 0.010 in one of 2048, as far as either is from float32; the
largest of 16,000 is four times as much."""


def items(kit: Kit) -> Iterator[str]:
    for pair in kit.said["switched"]:
        lengths = lengths_of(kit, pair)
        if lengths:
            yield f"{pair['model']} {pair['pass']} {LOGITS}"
            yield from (f"{pair['model']} {pair['pass']} {PROMPT} {n}" for n in lengths)


def lengths_of(kit: Kit, pair: dict[str, Any]) -> list[int]:
    return [n for n in kit.said["settings"]["switched_prompts"] if n <= pair["n_context"]]


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> what was found."""
    opened: dict[str, Ours] = {}

    def run(name: str) -> dict[str, Any]:
        model, switch, task, *rest = name.split()
        pair = next(each for each in kit.said["switched"] if (each["model"], each["pass"]) == (model, switch))
        without, with_it = both(kit, pair, opened)
        if task == LOGITS:
            return compared(without, with_it, lengths_of(kit, pair), switch in KEEP_BITS)
        refuse_unequal(journal, f"{model} {switch}")
        return timed(without, with_it, int(rest[0]), kit.said["settings"]["pairs"], pair)

    return run


def refuse_unequal(journal: Journal, pair: str) -> None:
    """Raises RuntimeError: what the two say was compared, and is not the same."""
    if f"{pair} {LOGITS}" in journal.failed(STAGE):
        raise RuntimeError("their logits differ")


def both(kit: Kit, pair: dict[str, Any], opened: dict[str, Ours]) -> tuple[Ours, Ours]:
    """The model without the pass, and with it; one of them is what the kit carries anyway.  opened: those that are open
    by now, by name; others than these two are closed first, for memory has room for two."""
    from llmc.bench.gpu.ours import Ours

    names = (pair["model"], pair["artifact"])
    for name in [name for name in opened if name not in names]:
        opened.pop(name).close()
    for name in names:
        if name not in opened:
            opened[name] = Ours(kit, name, ())
    without, with_it = names if pair["adds"] else names[::-1]
    return opened[without], opened[with_it]


def compared(without: Ours, with_it: Ours, lengths: list[int], keeps_bits: bool) -> dict[str, Any]:
    """error: the largest difference of logits behind a prompt, in standard deviations; mean: the root of their mean
    square.  Raises ValueError: too large."""
    errors, means, agree = [], [], 0
    for n in lengths:
        (a, first), (b, second) = (ours.behind(n, NEW) for ours in (without, with_it))
        errors.append(float(np.abs(a - b).max() / a.std()))
        means.append(float(np.sqrt(np.square(a - b).mean()) / a.std()))
        agree += first == second
    if not max(errors if keeps_bits else means) <= MOST_ERROR:
        raise ValueError(f"logits differ by {max(errors):.3f} standard deviations, {max(means):.3f} in the mean")
    return {"error": max(errors), "mean": max(means), "same_tokens": agree, "of": len(lengths)}


def timed(without: Ours, with_it: Ours, n: int, n_pairs: int, pair: dict[str, Any]) -> dict[str, Any]:
    """Seconds of prompts of n tokens without the pass and with it, in turns; the first pair is left out."""
    seconds: dict[str, list[float]] = {"without_s": [], "with_s": []}
    for seed in range(1 + n_pairs):
        turns = (("without_s", without), ("with_s", with_it))
        for name, ours in turns if seed % 2 else turns[::-1]:
            seconds[name].append(ours.first_token(n, seed))
    kept = {name: values[1:] for name, values in seconds.items()}
    ratio = median(b / a for a, b in zip(kept["without_s"], kept["with_s"], strict=True))
    return {
        "pass": pair["pass"],
        "model": pair["model"],
        "tokens": n,
        "rows": without.rows_of(n),
        "ratio": ratio,
        **kept,
    }


def report(journal: Journal) -> Iterator[str]:
    """What each pass comes to, as lines of Markdown."""
    for item, entry in journal.results(STAGE).items():
        if f" {LOGITS}" in item:
            yield f"- {item}: differ by {entry['error']:.2g} standard deviations"
        else:
            yield (
                f"- {item}: {entry['ratio']:.3f} times as long with it ({len(entry['with_s'])} pairs, "
                f"{1e3 * median(entry['with_s']):.2f} instead of {1e3 * median(entry['without_s']):.2f} ms)"
            )

"""What adapters cost that stay beside the weights: see docs/models.md, "Adapters".

    llmc compile DIR -o base.so
    llmc compile DIR --adapter a=LORA --adapter b=LORA2 … -o named.so
    python bench/adapters.py base.so named.so [--context 256] [--batch 4] [--prompt 512] [--steps 31] [--record FILE]

Times are those of steps in turns, of the one artifact and of the other: of one sequence and of a batch, without an
adapter, with one, and with as many as there are; and of prompts.  What is said is the median of ratios to the artifact
that has none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

from llmc.bench.limits import cpu_name
from llmc.runtime import load
from llmc.runtime.binding import Model

PROMPTS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("named", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    room = 8 * options.batch * (options.context + 64) + 2 * options.prompt
    said: dict[str, Any] = {
        "artifacts": [options.base.name, options.named.name],
        "machine": cpu_name(),
        "date": datetime.date.today().isoformat(),
        "context": options.context,
    }
    with (
        load(options.base, threads=options.threads, kv_tokens=room) as base,
        load(options.named, threads=options.threads, kv_tokens=room) as named,
    ):
        models = {"base": base, "without": named, "one": named, "each its own": named}
        text = [3 + 7 * i % 900 for i in range(max(options.context, options.prompt))]
        for size in (1, options.batch):
            said[f"decode of {size}"] = decode(models, text[: options.context], size, options.steps)
        said[f"prompt of {options.prompt}"] = prompts(models, text[: options.prompt])
    print(json.dumps(said, indent=1))
    if options.record:
        options.record.write_text(json.dumps(said, indent=1) + "\n")


def adapter_of(model: Model, case: str, index: int) -> str | None:
    """Of the sequence of this index."""
    names = model.adapters
    return names[index % len(names) if case == "each its own" else 0] if case in ("one", "each its own") else None


def decode(models: dict[str, Model], text: list[int], size: int, n_steps: int) -> dict[str, float]:
    """Steps on one token of each of `size` sequences."""
    sequences = {
        case: [model.sequence(adapter_of(model, case, i)) for i in range(size)] for case, model in models.items()
    }
    for case, model in models.items():
        model.step([(sequence, text) for sequence in sequences[case]])

    def seconds(case: str) -> float:
        for sequence in sequences[case]:
            sequence.truncate(len(text))
        start = time.perf_counter()
        models[case].step([(sequence, text[:1]) for sequence in sequences[case]])
        return time.perf_counter() - start

    found = ratios([{case: seconds(case) for case in models} for _ in range(n_steps + 1)][1:])
    for each in sequences.values():
        for sequence in each:
            sequence.close()
    return found


def prompts(models: dict[str, Model], text: list[int]) -> dict[str, float]:
    """A text of one sequence."""

    def seconds(case: str) -> float:
        with models[case].sequence(adapter_of(models[case], case, 0)) as sequence:
            start = time.perf_counter()
            sequence.feed(text)
            return time.perf_counter() - start

    return ratios([{case: seconds(case) for case in list(models)[:3]} for _ in range(PROMPTS)])


def ratios(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians: the base's milliseconds, and the others' times over its."""
    base = statistics.median(times["base"] for times in rounds)
    others = [case for case in rounds[0] if case != "base"]
    return {"ms": round(1e3 * base, 3)} | {
        case: round(statistics.median(times[case] / times["base"] for times in rounds), 3) for case in others
    }


if __name__ == "__main__":
    main()

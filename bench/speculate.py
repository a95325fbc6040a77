"""What guesses cost, and what they bring: see docs/design.md, "Speculative decoding".

    python bench/speculate.py FILE.so [--context 256] [--guesses 1,3,7] [--steps 15] [--record bench/records/NAME.json]
    python bench/speculate.py FILE.so --prompts FILE.txt [--tokens 200] [--most 7] [--draft SMALL.so]

The first part times steps of one token and of one with so many guesses, the first of them wrong, in turns, on a text of
--context tokens: the weights may be random.  The second, for a model that has learned something, continues each line of
a file, greedy and drawn, and says how many tokens a step has kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from llmc.bench.limits import cpu_name
from llmc.runtime import load
from llmc.runtime.binding import Model
from llmc.runtime.generation import GREEDY, How
from llmc.runtime.speculate import Guess, Guessed, Speculation, speculate

HOWS = {"greedy": GREEDY, "drawn": How(temperature=0.8, top_p=0.95, seed=1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--guesses", default="1,3,7")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=Path, help="a text, a prompt a line")
    parser.add_argument("--tokens", type=int, default=200, help="of each text, at most")
    parser.add_argument("--most", type=int, choices=range(1, 64), default=7, metavar="N", help="guesses in a step")
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    said: dict[str, Any] = {
        "artifact": options.artifact.name,
        "machine": cpu_name(),
        "date": datetime.date.today().isoformat(),
    }
    with load(options.artifact, threads=options.threads) as model:
        counts = [int(n) for n in options.guesses.split(",")]
        said["context"] = options.context
        said["step_over_one_token's"] = costs(model, options.context, counts, options.steps)
        if options.prompts:
            with load(options.draft) if options.draft else nullcontext() as draft:
                prompts = options.prompts.read_text().splitlines()
                said["texts"] = [kept(model, draft, prompts, kind, options) for kind in HOWS]
    print(json.dumps(said, indent=1))
    if options.record:
        options.record.write_text(json.dumps(said, indent=1) + "\n")


def costs(model: Model, context: int, counts: list[int], n_steps: int) -> dict[str, float]:
    """The time of a step on a token and so many wrong guesses over that of a step on the token: medians of ratios."""
    logits = np.empty((1 + max(counts), model.info.n_vocab), np.float32)
    text = [5 + 7 * i % 900 for i in range(context)]
    with model.sequence() as sequence:
        sequence.feed(text)
        wrong = (sequence.sample() + 1) % model.info.n_vocab

        def seconds(n: int) -> float:
            sequence.truncate(context)
            ids = model.check_ids([wrong] * (1 + n))
            start = time.perf_counter()
            speculate(model, [Guessed(sequence, GREEDY, ids, Guess([wrong] * n), logits)])
            return time.perf_counter() - start

        seconds(0)
        rounds = [[seconds(n) for n in (0, *counts)] for _ in range(n_steps)]
    ratios = [[one / times[0] for one in times[1:]] for times in rounds]
    return {
        str(n): round(statistics.median(column), 3) for n, column in zip(counts, zip(*ratios, strict=True), strict=True)
    }


def kept(
    model: Model, draft: Model | None, prompts: list[str], kind: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens that a step kept, over all prompts, and the time of one token at a time over that with guesses."""
    n_tokens = n_steps = n_guessed = n_right = 0
    times = [0.0, 0.0]
    for prompt in prompts:
        plain = model.stream(prompt, options.tokens, HOWS[kind])
        guesses = Speculation.of(model, options.most, draft)
        guided = model.stream(prompt, options.tokens, HOWS[kind], speculation=guesses)
        said = list(plain)
        if list(guided) != said or guesses is None:
            raise SystemExit(f"with guesses the text is another: {prompt!r}")
        times[0] += plain.decode_s
        times[1] += guided.decode_s
        n_tokens += len(said) - 1  # the first is the prompt's
        n_steps += guesses.n_steps
        n_guessed += guesses.n_guessed
        n_right += guesses.n_right
    return {
        "how": kind,
        "texts": len(prompts),
        "tokens_a_step": round(n_tokens / max(n_steps, 1), 2),
        "guessed": n_guessed,
        "right": n_right,
        "speed_up": round(times[0] / times[1], 2) if times[1] else None,
    }


if __name__ == "__main__":
    main()

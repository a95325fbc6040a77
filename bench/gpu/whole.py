"""Whole models: how many tokens a second, how near to the limit, how much faster than Hugging Face; the same?

Every item is one measurement of one system; systems of a model stay loaded, and take turns at each point.  What is
measured, in which order, is the table WISHES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from llmc.bench.gpu.filled import model_of
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.limits import COPY_LIMIT
from llmc.bench.gpu.trace import traced

STAGE = "whole"
LLMC, HF, GRAPH, COMPILED, FLASH = "llmc", "hf", "hf-graph", "hf-compile", "hf-flash"
"""llmc; transformers eager; the same with a static cache as a CUDA graph; under torch.compile; eager with
FlashAttention and nothing else."""
SHORT, POINTS, QUANTISED, COMPILED_POINTS, MANY = (
    "models in short",
    "models",
    "quantised models",
    "compiled",
    "many sequences",
)
SETTINGS: dict[str, Any] = {
    "short": [[1, 128], [8, 128], [1, 1024], [8, 1024]],
    "decode": [[batch, length] for batch in (1, 8, 2, 4) for length in (128, 1024, 2048, 4096)],
    "timeline": [[1, 128], [8, 128]],
    "traced_prompts": [2048],
    "quantised": [[1, 128], [8, 128], [1, 1024]],
    "compiled": [[1, 128], [8, 128]],
    "flash": [[1, 4096], [8, 4096]],
    "decode_large": [[batch, length] for batch in (16, 32, 64) for length in (128, 1024)],
    "prefill": [1024, 2048, 4096],
    "read": 512,
    "first": 3,
    "steps": 16,
    "eager_steps": 6,
    "prompts": 3,
}
"""Points of (batch, length), lengths of prompts, and how many of each.  read: tokens of a context that are read; the
rest repeats their keys and values.  first, steps: of a decode those that do not count, in which graphs are loaded and
caches filled, and those that do; of Hugging Face's eager ones, which take longest and differ least, fewer."""


@dataclass(frozen=True)
class Wish:
    """What is measured of every model that is, or isn't, quantised, one model after the other.

    points: a task, a name in SETTINGS, and the systems that take turns at each of its points.  logits: llmc's first,
    against float32 and Hugging Face's.  backwards: the last model first, which is still loaded.
    """

    name: str
    quantised: bool
    points: tuple[tuple[str, str, tuple[str, ...]], ...]
    logits: bool = False
    backwards: bool = False


QUANTISED_POINTS = (("decode", "quantised"), ("timeline", "timeline"), ("prefill", "prefill"))
WISHES = (
    Wish(SHORT, False, (("decode", "short", (LLMC, HF, GRAPH)), ("timeline", "timeline", (LLMC,))), logits=True),
    Wish(
        POINTS,
        False,
        (
            ("prefill", "prefill", (LLMC, HF)),
            ("timeline", "traced_prompts", (LLMC,)),
            ("decode", "decode", (LLMC, HF, GRAPH)),
        ),
        backwards=True,
    ),
    Wish(QUANTISED, True, tuple((task, points, (LLMC,)) for task, points in QUANTISED_POINTS)),
    Wish(COMPILED_POINTS, False, (("decode", "compiled", (COMPILED,)), ("decode", "flash", (FLASH,)))),
    Wish(MANY, False, (("decode", "decode_large", (LLMC,)),), backwards=True),
)
SHORT_PROMPT = 96
"""Tokens of the prompt whose logits are compared."""
NEW = 32
MOST_KERNELS = 8
"""The most kernels of a timeline in the summary."""


def items(kit: Kit) -> Iterator[str]:
    yield from wished(kit)


def wish_of(kit: Kit, item: str) -> str:
    return wished(kit).get(item, "")


def wished(kit: Kit) -> dict[str, str]:
    """The items in order, each with the name of the wish that it is of."""
    found: dict[str, str] = kit.remembered.setdefault(STAGE, {})
    if not found:
        for wish in WISHES:
            for model in kit.said["models"][:: -1 if wish.backwards else 1]:
                if is_quantised(kit, model) == wish.quantised:
                    for item in items_of(kit, model, wish):
                        found.setdefault(item, wish.name)
    return found


def items_of(kit: Kit, model: str, wish: Wish) -> Iterator[str]:
    if wish.logits:
        yield from (f"{model} {system} {task}" for system in (LLMC, HF) for task in ("load", "logits"))
    elif wish.quantised:
        yield f"{model} {LLMC} load"
    for task, points, systems in wish.points:
        for point in kit.said["settings"][points]:
            at = "x".join(map(str, point)) if isinstance(point, list) else str(point)
            yield from (f"{model} {system} {task} {at}" for system in systems)


def is_recorded(item: str) -> bool:
    """Whether it records graphs with PyTorch: where that fails, the process had better end."""
    return item.split()[1] in (GRAPH, COMPILED)


def is_quantised(kit: Kit, model: str) -> bool:
    return str(model_of(kit, model).said["quant"]) != "none"


def filled_early(kit: Kit) -> list[str]:
    """Models whose weights are made while kernels are checked."""
    return [model for model in kit.said["models"] if not is_quantised(kit, model)]


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> seconds, or what was found."""
    loaded: dict[tuple[str, str], Any] = {}

    def run(name: str) -> dict[str, Any]:
        model, system, task, *rest = name.split()
        room = room_of(kit, name)
        kind = (model, room if system == LLMC else HF)
        for other in [key for key in loaded if key[0] != model or (key[1] == MANY) != (room == MANY)]:
            loaded.pop(other).close()
        if kind not in loaded:
            loaded[kind] = opened(kit, model, system, room)
        subject = loaded[kind]
        if task == "load":
            found: dict[str, Any] = subject.facts()
            return found
        if task == "logits":
            return compare(subject, journal, model, system)
        if task == "prefill":
            return {"seconds": subject.prefill(int(rest[0])), "tokens": int(rest[0])}
        if task == "timeline" and "x" not in rest[0]:
            return traced(lambda: subject.prefill(int(rest[0])))
        batch, length = map(int, rest[0].split("x"))
        if task == "timeline":
            return traced(lambda: subject.decode(batch, length, system))
        seconds = subject.decode(batch, length, system)
        return {"seconds": seconds, "tokens_per_s": batch / median(seconds), **subject.step_bytes(batch, length)}

    return run


def room_of(kit: Kit, item: str) -> str:
    """What llmc's cache must have room for: many sequences, beside which no other system has any, or the rest."""
    return MANY if wish_of(kit, item) == MANY else LLMC


def opened(kit: Kit, model: str, system: str, room: str) -> Any:
    """A system with a model."""
    if system == LLMC:
        from llmc.bench.gpu.ours import Ours

        quantised = is_quantised(kit, model)
        points = ("decode_large",) if room == MANY else ("quantised",) if quantised else ("short", "decode")
        return Ours(kit, model, points)
    from llmc.bench.gpu.hf import HuggingFace

    return HuggingFace(kit, model)


def prompt_of(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).integers(3, n_vocab, n)
    return [int(token) for token in drawn]


def compare(subject: Any, journal: Journal, model: str, system: str) -> dict[str, Any]:
    """llmc: logits and greedy tokens, kept beside the journal.  Hugging Face: its own error, llmc's, and the tokens,
    all against float32."""
    prompt = prompt_of(SHORT_PROMPT, subject.n_vocab)
    path = journal.path.with_name(f"{model}-logits.npz")
    if system == LLMC:
        tokens = subject.tokens(prompt, NEW)
        np.savez_compressed(path, logits=subject.logits(prompt)[-16:], tokens=tokens)
        return {"tokens": tokens}
    own = subject.logits(prompt)[-16:]
    with np.load(path) as ours:
        tokens = [int(token) for token in ours["tokens"]]
        logits = ours["logits"]
    exact = subject.exact_logits([*prompt, *tokens])
    true = exact[SHORT_PROMPT - 16 : SHORT_PROMPT]
    errors = [float(np.sqrt(((each - true) ** 2).mean())) for each in (logits, own)]
    return {
        "error": errors[0],
        "hf_error": errors[1],
        "ratio": errors[0] / errors[1],
        **ties(exact, SHORT_PROMPT, tokens),
    }


def ties(logits: Any, n_prompt: int, tokens: list[int]) -> dict[str, Any]:
    """How the float32 model judges greedy tokens: how many are its own, and by how much the worst other one is below
    its best, in standard deviations of its logits."""
    rows = np.asarray(logits)[n_prompt - 1 : -1]
    best = rows.argmax(-1)
    gaps = rows.max(-1) - rows[np.arange(len(tokens)), tokens]
    return {"agree": int((best == tokens).sum()), "of": len(tokens), "gap": float((gaps / rows.std(-1)).max())}


# -- what was found ---------------------------------------------------------------------------------------------------


def report(journal: Journal, rates: Mapping[str, float]) -> Iterator[str]:
    """Decode and prefill beside Hugging Face, as lines of Markdown."""
    results = journal.results(STAGE)
    decoded = {item: entry for item, entry in results.items() if " llmc decode " in item}
    if decoded:
        yield "| model | batch x length | tokens/s | of the limit | over HF | over HF's graph | over HF compiled |"
        yield "|---|---|---|---|---|---|---|"
    for item, entry in decoded.items():
        model, _, _, point = item.split()
        others = (ratio(results, f"{model} {system} decode {point}", entry) for system in (HF, GRAPH, COMPILED))
        row = (model, point, f"{entry['tokens_per_s']:.0f}", of_limit(entry, rates), *others)
        yield f"| {' | '.join(row)} |"
    for item, entry in results.items():
        if " llmc prefill " in item:
            other = ratio(results, item.replace(" llmc ", " hf "), entry)
            beside = f", {other} over HF" if other else ""
            yield f"- {item}: {entry['tokens'] / median(entry['seconds']):.0f} tokens/s{beside}"
        elif " llmc timeline " in item:
            for kernel in entry["kernels"][:MOST_KERNELS]:
                us = f"{kernel['us']:.1f} µs, {kernel['advance_us']:.1f} behind the one before"
                yield f"- {item}: {kernel['n']} times {kernel['name']}: {us}"
        elif item.endswith("hf logits"):
            yield (
                f"- {item}: error {entry['ratio']:.2f}x HF's; {entry['agree']} of {entry['of']} tokens are the float32 "
                f"model's, the others within {entry['gap']:.3f} standard deviations"
            )


def of_limit(entry: Entry, rates: Mapping[str, float]) -> str:
    if COPY_LIMIT not in rates:
        return ""
    return f"{100 * entry['bytes'] / rates[COPY_LIMIT] / median(entry['seconds']):.0f} %"


def ratio(results: Mapping[str, Entry], other: str, entry: Entry) -> str:
    """How many times longer the other takes; nothing where it is not measured."""
    if other not in results:
        return ""
    return f"{median(results[other]['seconds']) / median(entry['seconds']):.2f}x"

"""Whole models: how many tokens a second, how near to the limit, how much faster than Hugging Face; the same?

Every item is one measurement of one system; models stay loaded from one item to the next.  llmc's artifact is written
when it is first needed (fill.py), into a folder with room for it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.limits import COPY_LIMIT

STAGE = "whole"
SETTINGS: dict[str, Any] = {
    "decode": [[batch, length] for length in (128, 1024, 2048, 4096) for batch in (1, 2, 4, 8)],
    "decode_large": [[batch, length] for length in (128, 1024) for batch in (16, 32, 64)],
    "prefill": [1024, 2048, 4096],
    "first": 8,
    "steps": 24,
    "prompts": 6,
}
"""Points of (batch, length); lengths of prompts, and how many of each; steps of a decode that do not count, in which
graphs are loaded and caches filled, and that do."""
OTHERS_BATCH, COMPILED_LENGTHS = (1, 8), (128, 1024)
"""Where Hugging Face is measured beside."""
HF, COMPILED = "hf", "hf-compile"
SYSTEMS = ("llmc", HF, COMPILED)
SHORT = 96
"""Tokens of the prompt whose logits are compared."""
NEW = 32


def items(kit: Kit) -> Iterator[str]:
    """What the bars are about first: llmc at every point, then the others where they are asked about."""
    said, models = kit.said["settings"], kit.said["models"]
    points = said["decode"]
    plain = [model for model in models if not is_quantised(kit, model)]
    for model in plain:
        yield from (f"{model} llmc decode {b}x{n}" for b, n in points)
        yield from (f"{model} llmc prefill {n}" for n in said["prefill"])
        yield f"{model} llmc logits"
        yield from (f"{model} llmc decode {b}x{n}" for b, n in said["decode_large"])
    for model in plain:
        beside = [(b, n) for b, n in points if b in OTHERS_BATCH]
        yield f"{model} hf logits"
        yield from (f"{model} hf decode {b}x{n}" for b, n in beside)
        yield from (f"{model} hf prefill {n}" for n in said["prefill"])
        yield from (f"{model} hf-compile decode {b}x{n}" for b, n in beside if n in COMPILED_LENGTHS)
    for model in models:
        if model not in plain:
            yield from (f"{model} llmc decode {b}x{n}" for b, n in points if n == min(n for _, n in points))


def is_quantised(kit: Kit, model: str) -> bool:
    return str(Model(kit.folder / "models" / model).said["quant"]) != "none"


def runner(kit: Kit, journal: Journal) -> Callable[[str], dict[str, Any]]:
    """run(item) -> seconds, or what was found."""
    loaded: dict[tuple[str, str], Any] = {}

    def run(name: str) -> dict[str, Any]:
        model, system, task, *rest = name.split()
        kind = "llmc" if system == "llmc" else "hf"
        if (model, kind) not in loaded:
            for other in loaded.values():
                other.close()
            loaded.clear()
            make = Ours if kind == "llmc" else HuggingFace
            loaded[model, kind] = make(Model(kit.folder / "models" / model), kit.said["settings"])
        subject = loaded[model, kind]
        if task == "logits":
            return compare(subject, journal, model)
        if task == "prefill":
            return {"seconds": subject.prefill(int(rest[0])), "tokens": int(rest[0])}
        batch, length = map(int, rest[0].split("x"))
        how = {"compiled": True} if system == COMPILED else {}
        seconds = subject.decode(batch, length, **how)
        return {"seconds": seconds, "tokens_per_s": batch / median(seconds), **subject.step_bytes(batch, length)}

    return run


def prompt_of(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).integers(3, n_vocab, n)
    return [int(token) for token in drawn]


# -- llmc -------------------------------------------------------------------------------------------------------------


class Ours:
    """The artifact, by its own runtime."""

    def __init__(self, model: Model, settings: Mapping[str, Any]) -> None:
        from llmc.runtime import load

        self.said, self.settings = model.said, settings
        path = written(model)
        n_context = model.said["n_context"]
        room = max(
            batch * min(length + 64, n_context) for batch, length in settings["decode"] + settings["decode_large"]
        )
        self.model = load(path, kv_tokens=room)
        self.n_vocab = self.model.info.n_vocab

    def close(self) -> None:
        self.model.close()

    def decode(self, batch: int, length: int) -> list[float]:
        """Seconds of single steps of `batch` sequences, the last of which makes them `length` tokens long."""
        from llmc.runtime.generation import How

        first, steps = self.settings["first"], self.settings["steps"]
        n_prompt = max(1, length - first - steps)
        greedy = How()
        sequences = [self.model.sequence() for _ in range(batch)]
        try:
            for seed, sequence in enumerate(sequences):
                sequence.feed(prompt_of(n_prompt, self.n_vocab, seed))
            seconds = []
            for _ in range(min(length - n_prompt, first + steps)):
                began = time.perf_counter()
                chosen = self.model.sample([(sequence, greedy) for sequence in sequences])
                self.model.step([(s, [token]) for s, token in zip(sequences, chosen, strict=True)])
                seconds.append(time.perf_counter() - began)
        finally:
            for sequence in sequences:
                sequence.close()
        return seconds[first:]

    def prefill(self, n: int) -> list[float]:
        """Seconds until the first token of a prompt of n tokens is known."""
        seconds = []
        for seed in range(self.settings["prompts"]):
            prompt = prompt_of(n - 1, self.n_vocab, seed)
            with self.model.sequence() as sequence:
                began = time.perf_counter()
                sequence.feed(prompt)
                sequence.sample()
                seconds.append(time.perf_counter() - began)
        return seconds[1:]

    def step_bytes(self, batch: int, length: int) -> dict[str, int]:
        """What a step must read: weights, without the tables of which it looks up rows, and the contexts."""
        weights = self.said["weights"]
        tables = sum(w["bytes"] for w in weights if w["layout"]["kind"] == "RowMajor" and w["bytes"] > 1 << 20)
        cache = batch * length * self.model.info.kv_bytes_per_token
        return {"bytes": sum(w["bytes"] for w in weights) - tables + cache}

    def logits(self, prompt: list[int]) -> np.ndarray[Any, Any]:
        return self.model.logits(prompt)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self.model.tokens(prompt, n, ignore_eos=True)


def written(model: Model) -> Path:
    """The artifact's file; written now if it isn't there."""
    folder = work_folder(model.said["weight_bytes"])
    path = folder / f"{model.name}.so"
    if not path.exists():
        partial = path.with_suffix(".partial")
        model.write(partial)
        partial.chmod(0o755)
        partial.replace(path)
    return path


def work_folder(n_bytes: int) -> Path:
    """Where there is room: memory first, since the file is read but once or twice."""
    name = "llmc-gpu-models"
    chosen = os.environ.get("LLMC_GPU_WORK")
    for place in [chosen] if chosen else ["/dev/shm", tempfile.gettempdir(), "."]:
        folder = Path(place, name)
        if folder.exists() or (Path(place).is_dir() and shutil.disk_usage(place).free > 1.2 * n_bytes):
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free > 1.2 * n_bytes or any(folder.glob("*.so")):
                return folder
    raise RuntimeError(f"no folder has {n_bytes / 1e9:.1f} GB free; name one in LLMC_GPU_WORK")


# -- Hugging Face -----------------------------------------------------------------------------------------------------


class HuggingFace:
    """transformers with the same weights: eager, or compiled with a static cache."""

    def __init__(self, model: Model, settings: Mapping[str, Any]) -> None:
        from llmc.bench.gpu import hf

        self._hf = hf
        self.said, self.settings = model.said, settings
        self.model = hf.load(model)
        self.source = model

    @cached_property
    def exact(self) -> Any:
        """The same model in float32."""
        return self._hf.load(self.source, "float32")

    def close(self) -> None:
        self.__dict__.pop("exact", None)
        del self.model
        self._hf.forget()

    def decode(self, batch: int, length: int, compiled: bool = False) -> list[float]:
        first, steps = self.settings["first"], self.settings["steps"]
        prompts = [prompt_of(max(1, length - first - steps), self.said["n_vocab"], seed) for seed in range(batch)]
        return self._hf.decode(self.model, prompts, length, first, steps, compiled=compiled)

    def prefill(self, n: int) -> list[float]:
        n_prompts = self.settings["prompts"]
        prompts = [prompt_of(n - 1, self.said["n_vocab"], seed) for seed in range(n_prompts)]
        return [self._hf.prefill(self.model, prompt) for prompt in prompts][1:]

    def step_bytes(self, batch: int, length: int) -> dict[str, int]:
        return {}

    def logits(self, prompt: list[int]) -> np.ndarray[Any, Any]:
        return np.asarray(self._hf.logits(self.model, prompt))


def compare(subject: Ours | HuggingFace, journal: Journal, model: str) -> dict[str, Any]:
    """llmc: logits and greedy tokens, kept beside the journal.  Hugging Face: its own error, llmc's, and the tokens,
    all against float32."""
    prompt = prompt_of(SHORT, subject.said["n_vocab"])
    path = journal.path.with_name(f"{model}-logits.npz")
    if isinstance(subject, Ours):
        tokens = subject.tokens(prompt, NEW)
        np.savez_compressed(path, logits=subject.logits(prompt)[-16:], tokens=tokens)
        return {"tokens": tokens}
    with np.load(path) as ours:
        tokens = [int(token) for token in ours["tokens"]]
        logits = ours["logits"]
    true = np.asarray(subject._hf.logits(subject.exact, prompt))[-16:]
    errors = [float(np.sqrt(((each - true) ** 2).mean())) for each in (logits, subject.logits(prompt)[-16:])]
    return {
        "error": errors[0],
        "hf_error": errors[1],
        "ratio": errors[0] / errors[1],
        **ties(subject._hf.logits(subject.exact, [*prompt, *tokens]), SHORT, tokens),
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
        yield "| model | batch x length | tokens/s | of the limit | over HF | over torch.compile |"
        yield "|---|---|---|---|---|---|"
    for item, entry in decoded.items():
        model, _, _, point = item.split()
        others = (ratio(results, f"{model} {system} decode {point}", entry) for system in (HF, COMPILED))
        row = (model, point, f"{entry['tokens_per_s']:.0f}", of_limit(entry, rates), *others)
        yield f"| {' | '.join(row)} |"
    for item, entry in results.items():
        if " llmc prefill " in item:
            other = ratio(results, item.replace(" llmc ", " hf "), entry)
            yield f"- {item}: {entry['tokens'] / median(entry['seconds']):.0f} tokens/s, {other or '?'} over HF"
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

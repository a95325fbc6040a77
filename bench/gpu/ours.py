"""llmc under measurement: the artifact, by its own runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from llmc import __version__
from llmc.bench.contexts import context_bytes
from llmc.bench.gpu.filled import model_of, ready
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.whole import prompt_of
from llmc.bench.steps import step_seconds
from llmc.compiler.kernel import PAGE_TOKENS
from llmc.runtime import load
from llmc.runtime.sequence import Sequence as Text


class Ours:
    """A model of the kit, opened.  points: names in the kit's settings, for which its cache has room."""

    def __init__(self, kit: Kit, name: str, points: Sequence[str]) -> None:
        model = model_of(kit, name)
        self.said, self.settings = model.said, kit.said["settings"]
        path = ready(kit, name)
        began = time.perf_counter()
        self.model = load(path, kv_tokens=self._room(points))
        self.load_s = time.perf_counter() - began
        self.n_vocab = self.model.info.n_vocab

    def _room(self, points: Sequence[str]) -> int:
        """Tokens of the largest point, each sequence in whole pages, and of the one that is repeated."""
        settings, most = self.settings, int(self.said["n_context"])
        listed = [point for name in points for point in settings[name]]
        each = [batch * (-(-min(length, most) // PAGE_TOKENS) + 1) for batch, length in listed]
        prompts = [-(-min(n, most) // PAGE_TOKENS) for n in settings["prefill"]]
        return PAGE_TOKENS * int(max([*each, *prompts]) + settings["read"] // PAGE_TOKENS + 2)

    def close(self) -> None:
        self.model.close()

    def facts(self) -> dict[str, Any]:
        """What a record says of the model, and of llmc."""
        said = {name: self.said[name] for name in ("name", "dtype", "quant", "n_context")}
        return {
            **said,
            "load_s": self.load_s,
            "version": f"llmc {__version__}",
            "target": self.model.manifest["target"]["name"],
            "created": self.model.manifest.get("created", ""),
            "weight_bytes": self.said["weight_bytes"],
            "step_bytes": self.step_bytes(0, 0)["bytes"],
            "n_weights": sum(prod(w["shape"]) for w in self._read_by_steps()),
            "config": self.model.manifest["model"]["config"],
            "kv_bytes_per_token": self.model.info.kv_bytes_per_token,
            "kv_cache": self.model.manifest["kv_cache"],
            "device": self.model.info.device,
        }

    def decode(self, batch: int, length: int, system: str) -> list[float]:
        """Seconds of single steps of `batch` sequences, the last of which makes them `length` tokens long."""
        first, steps = self.settings["first"], self.settings["steps"]
        context = max(1, length - first - steps)
        sequences: list[Text] = []
        try:
            with self.model.sequence() as original:
                original.feed(prompt_of(min(context, self.settings["read"]), self.n_vocab))
                sequences += [original.repeat(context) for _ in range(batch)]
            self.model.step([(sequence, prompt_of(1, self.n_vocab)) for sequence in sequences])
            seconds = step_seconds(self.model, sequences, min(first + steps, length - context) - 1)
        finally:
            for sequence in sequences:
                sequence.close()
        return seconds[first - 1 :]

    def prefill(self, n: int) -> list[float]:
        """Seconds until the first token of a prompt of n tokens is known."""
        return [self.first_token(n, seed) for seed in range(self.settings["prompts"])][1:]

    def first_token(self, n: int, seed: int) -> float:
        """Seconds until the first token of one such prompt is known."""
        prompt = prompt_of(n - 1, self.n_vocab, seed)
        with self.model.sequence() as sequence:
            began = time.perf_counter()
            sequence.feed(prompt)
            sequence.sample()
            return time.perf_counter() - began

    def behind(self, n: int, n_new: int) -> tuple[np.ndarray[Any, Any], list[int]]:
        """The logits behind a prompt that leaves room for n_new of n tokens, and those tokens as they are chosen."""
        with self.model.sequence() as sequence:
            sequence.feed(prompt_of(n - n_new, self.n_vocab))
            logits, tokens = np.array(sequence.logits()), []
            for _ in range(n_new):
                tokens.append(sequence.sample())
                sequence.feed(tokens[-1:])
        return logits, tokens

    def rows_of(self, n: int) -> int:
        """Of the plan that a prompt of n tokens is mostly fed by."""
        rows = [int(plan["rows"]) for plan in self.model.manifest["plans"] if plan["kind"] == "body"]
        return min((m for m in rows if m >= n), default=max(rows))

    def step_bytes(self, batch: int, length: int) -> dict[str, int]:
        """What a step must read: weights, without the tables of which it looks up rows, and the contexts."""
        cache = batch * context_bytes(self.model.manifest["kv_cache"], length)
        return {"bytes": sum(w["bytes"] for w in self._read_by_steps()) + cache}

    def _read_by_steps(self) -> list[dict[str, Any]]:
        """The weights, without the tables."""
        return [w for w in self.said["weights"] if w["layout"]["kind"] != "RowMajor" or w["bytes"] <= 1 << 20]

    def logits(self, prompt: list[int]) -> np.ndarray[Any, Any]:
        return self.model.logits(prompt)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        return self.model.tokens(prompt, n, ignore_eos=True)

"""What `llmc bench` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODELS = ("llama2-7b", "opt-6.7b")
READ_TOKENS = 512
"""So many tokens of a longer context are read; the rest repeats their keys and values."""


@dataclass(frozen=True)
class Request:
    """models: artifacts, folders, hub ids or known names.  against: baselines by name, the first draws the line at 1.

    lengths: tokens of each sequence when the last timed step is done.  steps: timed, in a sample.
    rounds: samples of each point.  prefills: lengths of prompts whose time to the first token is measured.
    weights: "real", "random", or None: random for known names, whose speed is the same, else real.
    source: where an artifact given as a file was compiled from.  budget_s: stop after so long.
    neighbours: cores kept busy by others up to which a sample counts.  patience_s: waits for a quiet moment, a sample.
    """

    models: tuple[str, ...] = DEFAULT_MODELS
    against: tuple[str, ...] = ("hf",)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (128, 1024, 2048, 4096)
    prefills: tuple[int, ...] = (128,)
    dtype: str | None = None
    quant: str = "none"
    kv_dtype: str | None = None
    target: str = "cpu"
    weights: str | None = None
    source: str | None = None
    steps: int = 8
    rounds: int = 3
    threads: int = 1
    memory_bytes: float | None = None
    neighbours: float = 0.2
    patience_s: float = 0.0
    budget_s: float | None = None

    @property
    def systems(self) -> tuple[str, ...]:
        """Everyone measured, in the order of a round."""
        return ("llmc", *self.against)

    def context(self, length: int) -> int:
        """Tokens behind the first step, which is not timed."""
        return length - self.steps - 1


@dataclass(frozen=True)
class Task:
    """Decode steps of `batch` sequences that are `length` tokens long at the end, or (batch 0) a prompt of `length`."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"decode {self.batch}x{self.length}" if self.batch else f"prefill {self.length}"

    @property
    def n_tokens(self) -> int:
        """How many tokens one of its times gives (decode) or takes (prefill)."""
        return self.batch or self.length


def number(text: str) -> int:
    """128, 1k, 4K.  Raises ValueError."""
    text = text.strip().lower()
    value = int(text[:-1]) * 1024 if text.endswith("k") else int(text)
    if value < 1:
        raise ValueError(f"{text} is not positive")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Different numbers in rising order, from "128,1k".  Raises ValueError."""
    return tuple(sorted({number(part) for part in text.split(",") if part.strip()}))


def in_k(n: int) -> str:
    """1024 as 1k."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def prompt(n: int, n_vocab: int, salt: int = 0) -> list[int]:
    """Token ids that no other salt has in the same places; none of the first three, which end texts."""
    return [3 + (7 * i + 131 * salt) % min(30011, n_vocab - 3) for i in range(n)]


def files_folder() -> Path:
    """Artifacts and model files that measurements made: bench in llmc's part of the user's cache."""
    import os

    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLMC_CACHE") or Path(cache) / "llmc") / "bench"

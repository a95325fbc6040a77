"""llmc under measurement, through its Python binding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc import __version__
from llmc.bench.peers.protocol import Loading, Refusal, serve, timed
from llmc.bench.steps import step_seconds
from llmc.runtime import load
from llmc.runtime.sequence import Sequence


class Llmc:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        raise Refusal("artifacts are compiled by llmc bench itself")

    def load(self, loading: Loading) -> str:
        self.model = load(loading.path, threads=loading.threads, kv_tokens=loading.kv_tokens)
        self.original: Sequence | None = None
        return f"llmc {__version__}"

    def prefill(self, prompt: list[int]) -> float:
        self.forget()
        with self.model.sequence() as sequence:
            return timed(lambda: self.first_token(sequence, prompt))

    def first_token(self, sequence: Sequence, prompt: list[int]) -> None:
        sequence.feed(prompt)
        sequence.sample()

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        raise Refusal("llmc bench asks llmc for repeated contexts")

    def repeated(self, prompt: list[int], batch: int, context: int, steps: int) -> list[float]:
        if self.original is None:
            self.original = self.model.sequence()
            self.original.feed(prompt)
        sequences = [self.original.repeat(context) for _ in range(batch)]
        try:
            self.model.step([(sequence, prompt[:1]) for sequence in sequences])
            return step_seconds(self.model, sequences, steps)
        finally:
            for sequence in sequences:
                sequence.close()

    def forget(self) -> None:
        """Give back the pages of the original: the cache has room for one task at a time."""
        if self.original is not None:
            self.original.close()
            self.original = None


if __name__ == "__main__":
    serve(Llmc())

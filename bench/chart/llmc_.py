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
        self.held: list[Sequence] = []
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
        self.hold(prompt, batch, context)
        return self.step(steps)

    def hold(self, prompt: list[int], batch: int, context: int) -> None:
        """Make the sequences whose steps are asked for next."""
        self.let_go()
        if self.original is None:
            self.original = self.model.sequence()
            self.original.feed(prompt)
        for _ in range(batch):
            self.held.append(self.original.repeat(context))
        self.model.step([(sequence, prompt[:1]) for sequence in self.held])

    def step(self, steps: int = 1) -> list[float]:
        """Seconds of each of the next steps of the sequences that are held."""
        return step_seconds(self.model, self.held, steps)

    def let_go(self) -> None:
        while self.held:
            self.held.pop().close()

    def forget(self) -> None:
        """Give back all pages: the cache has room for one task at a time."""
        self.let_go()
        if self.original is not None:
            self.original.close()
            self.original = None


if __name__ == "__main__":
    serve(Llmc())

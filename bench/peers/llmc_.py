"""llmc itself, through its Python binding: f32, bf16, int8, int4; "+head" quantises lm_head as the layers are, which is
int8 without it, but with mxfp4 of a checkpoint that does not keep it as codes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmc.bench.peers.protocol import Loading, serve, timed
from llmc.bench.steps import step_seconds
from llmc.compiler.driver import compile_model
from llmc.runtime import load
from llmc.runtime.sequence import Sequence


class Llmc:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        kind, _, head = precision.partition("+")
        plain = kind in ("f32", "bf16")
        compile_model(
            source if source.suffix == ".gguf" else config["known_as"],
            out=out,
            dtype=kind if plain else "bf16",
            quant="none" if plain else kind,
            quant_lm_head=bool(head) or None,
            weights="real" if source.suffix == ".gguf" else "random",
            verify=False,
        )

    def load(self, loading: Loading) -> str:
        room = (sum(loading.batches) + 1) * (loading.room + 64)
        slots = sum(loading.batches) + 1
        self.model = load(loading.path, threads=loading.threads, kv_tokens=room, slots=slots)
        self.contexts: dict[tuple[int, int], list[Sequence]] = {}
        try:
            return f"llmc {version('llmc')}"
        except PackageNotFoundError:
            return "llmc"

    def prefill(self, prompt: list[int]) -> float:
        with self.model.sequence() as sequence:
            return timed(lambda: self.first_token(sequence, prompt))

    def first_token(self, sequence: Sequence, prompt: list[int]) -> None:
        sequence.feed(prompt)
        sequence.sample()

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        sequences = self.contexts.setdefault((len(prompts), len(prompts[0])), [])
        sequences += [self.model.sequence() for _ in prompts[len(sequences) :]]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            n_kept = sequence.cut(len(prompt) - 1)
            if n_kept < len(prompt) - 1:
                sequence.feed(prompt[n_kept:-1])
        self.model.step([(sequence, prompt[-1:]) for sequence, prompt in zip(sequences, prompts, strict=True)])
        return step_seconds(self.model, sequences, steps)


if __name__ == "__main__":
    serve(Llmc())

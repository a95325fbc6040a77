"""CTranslate2: int8, with its own converter from a Hugging Face folder."""

from __future__ import annotations

import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ctranslate2  # type: ignore[import-not-found, unused-ignore]
from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found, unused-ignore]

from llmc.bench.peers.protocol import Loading, serve, timed


class CTranslate2:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        shutil.rmtree(out, ignore_errors=True)
        TransformersConverter(str(source), load_as_float16=True, low_cpu_mem_usage=True).convert(
            str(out), quantization=precision
        )

    def load(self, loading: Loading) -> str:
        self.generator = ctranslate2.Generator(
            str(loading.path),
            device="cpu",
            compute_type=loading.precision,
            inter_threads=1,
            intra_threads=loading.threads,
        )
        return f"CTranslate2 {ctranslate2.__version__}"

    def prefill(self, prompt: list[int]) -> float:
        return timed(lambda: self.generate([prompt], 1))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        times = self.generate(prompts, steps + 1)
        return [after - before for before, after in pairwise(times)]

    def generate(self, prompts: list[list[int]], n: int) -> list[float]:
        """Decode n tokens of each; when each step's last one came."""
        times: dict[int, float] = {}

        def note(result: Any) -> bool:
            times[result.step] = time.perf_counter()
            return False

        self.generator.generate_batch(
            [[word(token) for token in prompt] for prompt in prompts],
            max_length=n,
            min_length=n,
            include_prompt_in_result=False,
            callback=note,
        )
        return [times[step] for step in sorted(times)]


def word(token: int) -> str:
    """How the made-up tokenizer of the source folder spells a token."""
    return {0: "<unk>", 1: "<s>", 2: "</s>"}.get(token, f"w{token}")


if __name__ == "__main__":
    serve(CTranslate2())

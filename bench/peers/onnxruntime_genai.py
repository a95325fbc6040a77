"""ONNX Runtime GenAI: int4 in blocks of 32, from its own model builder; accuracy level 4 multiplies in int8."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found, unused-ignore]

from llmc.bench.peers.protocol import Loading, Refusal, serve, timed


class OnnxRuntimeGenAI:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as cache:
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
            builder += ["-p", precision, "-e", "cpu", "-c", cache, "--extra_options", "int4_accuracy_level=4"]
            if subprocess.run(builder, check=False).returncode:
                raise Refusal("its model builder failed")

    def load(self, loading: Loading) -> str:
        self.room = loading.room
        settings = og.Config(str(loading.path))
        threads = {"intra_op_num_threads": loading.threads, "inter_op_num_threads": 1}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self.model = og.Model(settings)
        return f"ONNX Runtime GenAI {version('onnxruntime-genai')}"

    def prefill(self, prompt: list[int]) -> float:
        generator = self.generator([prompt])
        return timed(lambda: (generator.append_tokens(np.array([prompt], np.int32)), generator.generate_next_token()))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        generator = self.generator(prompts)
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()  # chooses from the prompt's logits; each call after it runs the model
        seconds = [timed(generator.generate_next_token) for _ in range(steps)]
        if generator.is_done():
            raise Refusal("generation ended before the last step")
        return seconds

    def generator(self, prompts: list[list[int]]) -> Any:
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            batch_size=len(prompts), max_length=self.room, min_length=self.room, do_sample=False, num_beams=1
        )
        return og.Generator(self.model, params)


if __name__ == "__main__":
    serve(OnnxRuntimeGenAI())

"""OpenVINO GenAI: bf16, int8, int4 (groups of 128), exported by optimum-intel and compressed by NNCF."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, unused-ignore]

from llmc.bench.peers.protocol import Loading, Refusal, serve

COMPRESSION: dict[str, dict[str, Any]] = {
    "int8": {"mode": "INT8_ASYM"},
    "int4": {"mode": "INT4_ASYM", "group_size": 128, "ratio": 1.0},
}
"""optimum-cli's own settings for --weight-format int8 and int4: embedding and lm_head of int4 are in int8."""


class OpenVino:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if precision != "bf16":
            compress(out.with_name("openvino-bf16"), out, **COMPRESSION[precision])
            return
        program = Path(sys.executable).with_name("optimum-cli")
        command = [str(program), "export", "openvino", "--task", "text-generation-with-past", "--model", str(source)]
        if subprocess.run([*command, "--weight-format", "fp16", str(out)], check=False).returncode:
            raise Refusal("optimum-cli failed")

    def load(self, loading: Loading) -> str:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 4096  # all prompts of a batch in one step
        self.pipeline = genai.LLMPipeline(
            str(loading.path),
            "CPU",
            INFERENCE_NUM_THREADS=loading.threads,
            INFERENCE_PRECISION_HINT="bf16",
            scheduler_config=scheduler,
        )
        return f"OpenVINO GenAI {genai.__version__}, OpenVINO {openvino.__version__.partition('-')[0]}"

    def prefill(self, prompt: list[int]) -> float:
        return 1e-3 * float(self.generate([prompt], 1).perf_metrics.get_ttft().mean)

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        metrics = self.generate(prompts, steps + 1).perf_metrics.raw_metrics
        times = [1e-3 * ms for ms in metrics.m_new_token_times]
        if len(times) != steps + 1:
            raise Refusal(f"{len(times)} token times for {steps + 1} tokens")
        return [after - before for before, after in pairwise(times)]

    def generate(self, prompts: list[list[int]], n: int) -> Any:
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        how = genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = n, True, False
        return self.pipeline.generate(inputs, how)


def compress(folder: Path, out: Path, mode: str, **settings: Any) -> None:
    """What optimum-cli does with an exported model when a weight format is asked for."""
    import nncf  # type: ignore[import-not-found, unused-ignore]

    if not folder.exists():
        raise Refusal("prepare openvino:bf16 first: it is compressed")
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("openvino_model.*"))
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    compressed = nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **settings)
    openvino.save_model(compressed, out / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    serve(OpenVino())

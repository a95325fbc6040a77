"""Hugging Face transformers, eager (not compiled), attention by PyTorch's SDPA, a DynamicCache: f32, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from llmc.bench.peers.protocol import Loading, serve, timed

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class HuggingFace:
    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        """Nothing to write: weights are drawn when the model is loaded."""
        out.touch()

    @torch.inference_mode()
    def load(self, loading: Loading) -> str:
        torch.set_num_threads(loading.threads)
        self.config = AutoConfig.for_model(**loading.config)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=DTYPES[loading.precision], attn_implementation="sdpa"
            )
        pool = (torch.randn(1 << 22) * 0.02).to(DTYPES[loading.precision])
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    values = pool.repeat(parameter.numel() // len(pool) + 1)[: parameter.numel()]
                    module._parameters[name] = torch.nn.Parameter(values.reshape(parameter.shape), requires_grad=False)
        model.tie_weights()
        self.model = model.eval()
        self.caches: dict[tuple[int, ...], DynamicCache] = {}
        return f"transformers {transformers.__version__}, PyTorch {torch.__version__}"

    def prefill(self, prompt: list[int]) -> float:
        return timed(lambda: self.step(torch.tensor([prompt]), DynamicCache(config=self.config)))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        ids = torch.tensor(prompts)
        cache = self.caches.get(tuple(ids.shape))
        if cache is None:
            cache = self.caches[tuple(ids.shape)] = DynamicCache(config=self.config)
            self.step(ids[:, :-1], cache)
        if surplus := cache.get_seq_length() - (ids.shape[1] - 1):
            cache.crop(-surplus)
        self.token = self.step(ids[:, -1:], cache)
        return [timed(lambda: self.advance(cache)) for _ in range(steps)]

    def advance(self, cache: DynamicCache) -> None:
        self.token = self.step(self.token, cache)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """[batch, n] token ids -> [batch, 1] the next ones."""
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen: torch.Tensor = logits.argmax(-1)
        return chosen


if __name__ == "__main__":
    serve(HuggingFace())

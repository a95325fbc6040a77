"""Hugging Face transformers beside llmc, with the same weights: eager, or --compiled.

Eager: a forward pass a token, attention by PyTorch's SDPA, a DynamicCache.  Compiled: torch.compile with a StaticCache
as long as the point's sequences; with CUDA graphs on a GPU.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from llmc.bench.peers.protocol import Loading, Refusal, serve, timed
from llmc.compiler.frontend.config import read_config

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [1, n_heads, n_tokens, head_dim]."""


class HuggingFace:
    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled

    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        """Nothing to write: weights are read or drawn when the model is loaded."""

    @torch.inference_mode()
    def load(self, loading: Loading) -> str:
        torch.set_num_threads(loading.threads)
        self.device = torch.device(loading.device)
        self.model = load_model(loading).eval()
        self.original: KeysAndValues = []
        how = "torch.compile" if self.compiled else "eager"
        return f"transformers {transformers.__version__} {how}, PyTorch {torch.__version__}"

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        ids = torch.tensor([prompt], device=self.device)
        cache = DynamicCache(config=self.model.config)
        return self.timed(lambda: self.step(self.model, ids, cache))

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        raise Refusal("llmc bench asks transformers for repeated contexts")

    @torch.inference_mode()
    def repeated(self, prompt: list[int], batch: int, context: int, steps: int) -> list[float]:
        if not self.original:
            self.original = self.read(prompt)
        cache = self.cache(context + steps + 1)
        for layer, pair in enumerate(self.original):
            cache.update(*(repeat(tensor, batch, context) for tensor in pair), layer)
        model: Callable[..., Any] = self.model
        if self.compiled:
            torch._dynamo.reset()
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            model = torch.compile(self.model, mode=mode, dynamic=False)
        token = torch.tensor([prompt[:1]] * batch, device=self.device)
        token = self.step(model, token, cache)
        if self.compiled:  # CUDA graphs are recorded in the second call
            token = self.step(model, token, cache)
        seconds = []
        for _ in range(steps - self.compiled):
            tokens = [token]
            seconds.append(self.timed(lambda tokens=tokens: tokens.append(self.step(model, tokens[0], cache))))  # type: ignore[misc]
            token = tokens[1]
        return seconds

    def read(self, prompt: list[int]) -> KeysAndValues:
        cache = DynamicCache(config=self.model.config)
        self.step(self.model, torch.tensor([prompt], device=self.device), cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, room: int) -> DynamicCache | StaticCache:
        if self.compiled:
            return StaticCache(config=self.model.config, max_cache_len=room)
        return DynamicCache(config=self.model.config)

    def step(self, model: Callable[..., Any], ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """[batch, n] token ids -> [batch, 1] the next ones."""
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen: torch.Tensor = logits.argmax(-1)
        return chosen

    def timed(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            return timed(work)
        torch.cuda.synchronize()

        def finished() -> None:
            work()
            torch.cuda.synchronize()

        return timed(finished)


def repeat(tensor: torch.Tensor, batch: int, context: int) -> torch.Tensor:
    """[1, heads, n, d] -> [batch, heads, context, d]: the first tokens over and over."""
    n = tensor.shape[2]
    whole = tensor.repeat(batch, 1, -(-context // n), 1)
    return whole[:, :, :context].contiguous()


def load_model(loading: Loading) -> PreTrainedModel:
    """The weights that llmc compiled: from the checkpoint, or drawn from the same seed."""
    source, dtype = str(loading.path), DTYPES[loading.precision]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if loading.weights == "real":
        model = AutoModelForCausalLM.from_pretrained(source, **options)
        return model.to(loading.device)
    from llmc.compiler.frontend import load_source

    folder = Path(source)
    drawn = load_source(source, weights="random", dtype=loading.precision, seed=loading.seed).weights
    fields = read_config(folder) if folder.is_dir() else loading.config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **options)
    for prefix, module in model.named_modules():
        for own, parameter in module._parameters.items():
            name = f"{prefix}.{own}".lstrip(".")
            if parameter is not None and name in drawn:
                array = drawn[name].stored_as("bf16" if loading.precision == "bf16" else "f32").stored()
                if dtype == torch.bfloat16:  # PyTorch knows no bfloat16 of NumPy's, so its bits are passed
                    values = torch.from_numpy(array.view("int16")).view(dtype)
                else:
                    values = torch.from_numpy(array)
                module._parameters[own] = torch.nn.Parameter(values.to(loading.device), requires_grad=False)
    model.tie_weights()
    return model.to(loading.device)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    serve(HuggingFace(compiled="--compiled" in sys.argv))

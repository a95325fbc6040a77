"""Hugging Face transformers on the GPU, with the weights that the artifact has."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from llmc.bench.gpu.bits import values_of
from llmc.bench.gpu.fill import Model


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(model: Model, dtype: str = "bfloat16") -> Any:
    """The model with its random weights; parameters are drawn one by one, and go to the device as they are made."""
    warnings.filterwarnings("ignore")
    kind = getattr(torch, dtype)
    config = AutoConfig.for_model(**model.said["config"])
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation="sdpa")
    network.to_empty(device=device())
    restore_buffers(network, config)
    for prefix, module in network.named_modules():
        for own, parameter in module._parameters.items():
            name = model.drawn_name(f"{prefix}.{own}".lstrip("."))
            if parameter is None or name is None:
                continue
            drawn = torch.from_numpy(values_of(model.draw(name, tuple(parameter.shape)), model.said["dtype"]))
            module._parameters[own] = torch.nn.Parameter(drawn.to(device(), kind), requires_grad=False)
    network.tie_weights()
    return network.eval()


def restore_buffers(network: Any, config: Any) -> None:
    """Buffers that are no part of a checkpoint (rotary frequencies) are made anew, by a model of one layer."""
    small = type(config)(**{**config.to_dict(), "num_hidden_layers": 1})
    for name, buffer in AutoModelForCausalLM.from_config(small).named_buffers():
        owner = network.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], buffer.to(device()), persistent=False)


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


@torch.inference_mode()
def logits(network: Any, tokens: list[int]) -> Any:
    """float32 [n, V]."""
    ids = torch.tensor([tokens], device=device())
    return network(input_ids=ids).logits[0].float().cpu().numpy()


@torch.inference_mode()
def prefill(network: Any, prompt: list[int]) -> float:
    """Seconds until the next token is known."""
    ids = torch.tensor([prompt], device=device())
    return timed(lambda: step(network, ids, DynamicCache(config=network.config)).tolist())


@torch.inference_mode()
def decode(
    network: Any, prompts: list[list[int]], length: int, first: int, steps: int, *, compiled: bool
) -> list[float]:
    """Seconds of steps after the prompts, all of one length; the `first` do not count."""
    ids = torch.tensor(prompts, device=device())
    if compiled:
        torch._dynamo.reset()
        cache: Any = StaticCache(config=network.config, max_cache_len=length + 8)
        model: Callable[..., Any] = torch.compile(network, mode="reduce-overhead", dynamic=False)
    else:
        cache, model = DynamicCache(config=network.config), network
    token = step(network, ids, cache)
    seconds = []
    for _ in range(first + steps):
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        tokens = [token]
        seconds.append(timed(lambda t=tokens: t.append(step(model, t[0], cache).clone())))  # type: ignore[misc]
        token = tokens[1]
    return seconds[first:]


def step(model: Callable[..., Any], ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """[batch, n] token ids -> [batch, 1] the next ones."""
    answer = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    chosen: torch.Tensor = answer.logits.argmax(-1)
    return chosen


def timed(work: Callable[[], object]) -> float:
    """With everything done that was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

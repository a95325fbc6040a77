"""Hugging Face transformers on the GPU, with the weights that the artifact has.

    hf          a forward pass a token, attention by PyTorch's SDPA, a DynamicCache
    hf-flash    the same with FlashAttention: its package where it is installed, else SDPA's own kernel alone
    hf-graph    a StaticCache as long as the point, the step recorded as a CUDA graph and replayed
    hf-compile  a StaticCache, the step under torch.compile in its mode "reduce-overhead", which records graphs itself

With a static cache the step is given its mask and positions: nothing in it then waits for the GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from llmc.bench.gpu import fill
from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.filled import model_of
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.whole import COMPILED, FLASH, GRAPH, HF, prompt_of

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [1, n_heads, n_tokens, head_dim]."""
Step = Callable[[], torch.Tensor]
"""A step of all sequences -> the tokens it chose, [batch, 1]."""
WARM_UPS = 2
"""Steps before a graph is recorded: libraries allocate in the first."""


class HuggingFace:
    """A model of the kit in transformers."""

    def __init__(self, kit: Kit, name: str) -> None:
        warnings.filterwarnings("ignore")
        self.source, self.settings = model_of(kit, name), kit.said["settings"]
        self.n_vocab = int(self.source.said["n_vocab"])
        began = time.perf_counter()
        self.network = load(self.source)
        self.load_s = time.perf_counter() - began
        self.original: KeysAndValues = []

    def close(self) -> None:
        self.original = []
        del self.network
        forget()

    def facts(self) -> dict[str, Any]:
        version = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        return {"load_s": self.load_s, "version": version}

    def step_bytes(self, batch: int, length: int) -> dict[str, int]:
        return {}

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """float32 [n, V]."""
        return logits(self.network, tokens)

    @torch.inference_mode()
    def exact_logits(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        """The same by the model in float32, which is loaded for this alone."""
        exact = load(self.source, torch.float32)
        try:
            return logits(exact, tokens)
        finally:
            del exact
            forget()

    @torch.inference_mode()
    def prefill(self, n: int) -> list[float]:
        """Seconds until the next token is known."""
        seconds = []
        for seed in range(self.settings["prompts"]):
            ids = torch.tensor([prompt_of(n - 1, self.n_vocab, seed)], device=device())
            cache = DynamicCache(config=self.network.config)
            seconds.append(timed(lambda: chosen(self.network, ids, cache).tolist()))  # noqa: B023
        return seconds[1:]

    @torch.inference_mode()
    def decode(self, batch: int, length: int, system: str) -> list[float]:
        """Seconds of steps, the last of which makes the sequences `length` tokens long; the `first` do not count."""
        first = self.settings["first"]
        steps = self.settings["eager_steps" if system == HF else "steps"]
        spare = WARM_UPS + 1 if system in (GRAPH, COMPILED) else 0  # no position is beyond the model's table
        context = max(1, length - first - steps - spare)
        with self.steps(batch, context, length, system) as step:
            seconds = [timed(step) for _ in range(min(first + steps, length - context))]
        del step  # and its cache, before memory is given back
        forget()
        return seconds[first:]

    @contextmanager
    def steps(self, batch: int, context: int, length: int, system: str) -> Iterator[Step]:
        """A function that makes a step of sequences with so much context."""
        token = torch.tensor(prompt_of(1, self.n_vocab) * batch, device=device())[:, None]
        if system in (GRAPH, COMPILED):
            yield self.static_step(token, context, length, system)
            return
        cache, tokens = self.filled(DynamicCache(config=self.network.config), batch, context), [token]

        def step() -> torch.Tensor:
            tokens[0] = chosen(self.network, tokens[0], cache)
            return tokens[0]

        if system != FLASH:
            yield step
        elif importlib.util.find_spec("flash_attn"):
            with attention(self.network, "flash_attention_2"):
                yield step
        else:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield step

    def static_step(self, token: torch.Tensor, context: int, length: int, system: str) -> Step:
        """token: [batch, 1], which every step replaces."""
        batch, room = len(token), -(-(length + WARM_UPS + 1) // 8) * 8  # masks of whole vectors
        cache = self.filled(StaticCache(config=self.network.config, max_cache_len=room), batch, context)
        position, places = torch.tensor([context], device=device()), torch.arange(room, device=device())

        def body() -> torch.Tensor:
            mask = (places <= position).expand(batch, 1, 1, -1)
            return chosen(self.network, token, cache, mask=mask, position=position.expand(batch, 1))

        run = torch.compile(body, mode="reduce-overhead", dynamic=False) if system == COMPILED else body

        def step() -> torch.Tensor:
            if system == COMPILED:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            token.copy_(run())
            position.add_(1)
            return token

        return recorded(step) if system == GRAPH and torch.cuda.is_available() else step

    def filled(self, cache: Any, batch: int, context: int) -> Any:
        """The cache with the keys and values of a prompt, over and over."""
        if not self.original:
            cache_of_prompt = DynamicCache(config=self.network.config)
            n = min(self.settings["read"], self.source.said["n_context"])
            chosen(self.network, torch.tensor([prompt_of(n, self.n_vocab)], device=device()), cache_of_prompt)
            self.original = [(layer.keys, layer.values) for layer in cache_of_prompt.layers]
        for layer, pair in enumerate(self.original):
            cache.update(*(repeated(tensor, batch, context) for tensor in pair), layer)
        return cache


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def chosen(
    network: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None, position: torch.Tensor | None = None
) -> torch.Tensor:
    """[batch, n] token ids -> [batch, 1] the next ones."""
    given = {} if mask is None else {"attention_mask": mask, "position_ids": position}
    answer = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given)
    best: torch.Tensor = answer.logits.argmax(-1)
    return best


def logits(network: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    ids = torch.tensor([tokens], device=device())
    return np.asarray(network(input_ids=ids).logits[0].float().cpu().numpy())


def recorded(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return token

    return replay


def repeated(tensor: torch.Tensor, batch: int, context: int) -> torch.Tensor:
    """[1, heads, n, d] -> [batch, heads, context, d]: the first tokens over and over."""
    whole = tensor.repeat(batch, 1, -(-context // tensor.shape[2]), 1)
    return whole[:, :, :context].contiguous()


@contextmanager
def attention(network: Any, implementation: str) -> Iterator[None]:
    """Another implementation of attention meanwhile."""
    network.set_attn_implementation(implementation)
    try:
        yield
    finally:
        network.set_attn_implementation("sdpa")


def timed(work: Callable[[], object]) -> float:
    """The time of a call, with everything done that it asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


# -- loading ----------------------------------------------------------------------------------------------------------


def load(model: Model, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model with its random weights, drawn on the device."""
    config = AutoConfig.for_model(**model.said["config"])
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    network.to_empty(device=device())
    restore_buffers(network, config)
    for prefix, module in network.named_modules():
        for own, parameter in module._parameters.items():
            name = model.drawn_name(f"{prefix}.{own}".lstrip("."))
            if parameter is None or name is None:
                continue
            with torch.no_grad():
                parameter.copy_(drawn(model, name, tuple(parameter.shape)))
            parameter.requires_grad_(False)
    network.tie_weights()
    return network.eval()


def drawn(model: Model, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight as fill.draw has it: rows are windows of the pool, which lies on the device."""
    said = model.said
    bits = fill.pool(said["dtype"], fill.mean_of(name, shape), said["std"])
    numbers = torch.from_numpy(bits.view(np.int16 if said["dtype"] == "bf16" else bits.dtype)).to(device())
    if said["dtype"] == "bf16":
        numbers = numbers.view(torch.bfloat16)
    window = fill.window_of(shape)
    n = -(-int(np.prod(shape, dtype=np.int64)) // window)
    starts = torch.tensor(fill.offsets(name, shape, said["seed"], n), device=device())
    windows = numbers.as_strided((fill.POOL_SIZE, window), (1, 1))
    return windows[starts].reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


def restore_buffers(network: Any, config: Any) -> None:
    """Buffers that are no part of a checkpoint (rotary frequencies) are made anew, by the smallest model that has them:
    they depend on the heads, not on layers and vocabulary."""
    few = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "ffn_dim": 8}
    fields = config.to_dict()
    small = type(config)(**{**fields, **{name: n for name, n in few.items() if name in fields}})
    for name, buffer in AutoModelForCausalLM.from_config(small).named_buffers():
        owner = network.get_submodule(name.rpartition(".")[0])
        owner.register_buffer(name.rpartition(".")[2], buffer.to(device()), persistent=False)

"""Which products get 8 bits beside 4: those where they save most of what rounding costs the model, byte for byte.

Where a product's results are off by Δ_i at token i, the next tokens' distributions p diverge by, to second order,

    KL  =  ½ E (Σ_i g_i · Δ_i)²        g_i: the gradient of log p(y) by these results, y drawn from p

(the Fisher information of the results).  Gradients of different drawn tokens are not correlated, and errors at
different tokens are taken not to be either; so one backward pass of Σ log p(y) over a text gives ½ Σ_i (g_i · Δ_i)² for
every product at once.  Divergences of single products add up to that of all, nearly.

The gradients are transformers'.  Of a large model autograd keeps no weight: what it saves of one is read again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from llmc.compiler.frontend.as_torch import as_torch, run_by_transformers, stored_as_tensor
from llmc.compiler.frontend.quiet import quiet
from llmc.compiler.quantization.inputs import LEAST_INPUTS, round_inputs
from llmc.compiler.quantization.mixed import Product
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.compiler.weights import Array, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmc.compiler.frontend import SourceModel

N_SEQUENCES, N_TOKENS = 4, 128
"""Of the text: more tell little more, and activations of all of them are in memory."""


def products_of(source: SourceModel, scheme: Scheme, *, inputs: bool) -> tuple[list[Product], list[Weight]]:
    """What 4 bits cost each product of a model on scheme.calibration's text; and what else is quantised.

    inputs: whether kernels round what they multiply too, as CPUs' do.
    """
    assert scheme.calibration is not None
    model = as_torch(source, "f32")
    tokens = batch_of(scheme.calibration.sequences)
    with run_by_transformers(source, hint="leave --quant-bits out"):
        products = measured(model, source.weights, scheme, tokens, inputs=inputs)
    return products, experts_of(model, source.weights)


def batch_of(sequences: Sequence[Array]) -> torch.Tensor:
    """A few sequences at even distances, their first tokens: int64 [sequences, tokens]."""
    n_tokens = min(N_TOKENS, max(map(len, sequences)))
    long = [tokens for tokens in sequences if len(tokens) >= n_tokens]
    n = min(N_SEQUENCES, len(long))
    return torch.stack([torch.from_numpy(long[i * len(long) // n][:n_tokens]) for i in range(n)])


def experts_of(model: PreTrainedModel, weights: Mapping[str, Weight]) -> list[Weight]:
    """The matrices of experts, which no product of all tokens reads."""
    return [weights[name] for name, parameter in model.named_parameters() if parameter.ndim == 3 and name in weights]


def measured(
    model: PreTrainedModel, weights: Mapping[str, Weight], scheme: Scheme, tokens: torch.Tensor, *, inputs: bool
) -> list[Product]:
    """Every product of a model but the one that makes logits, in the order in which they run, and what 4 bits cost it.

    weights: by their parameters' names.  tokens: int64 [sequences, tokens].
    """
    head = model.requires_grad_(False).get_output_embeddings()
    watch = Watch(scheme, inputs)
    with quiet(), ExitStack() as hooks, rereading(model, weights):
        for name, module in model.named_modules():
            if module is not head and isinstance(module, torch.nn.Linear | Conv1D) and f"{name}.weight" in weights:
                watch.see(name, module, weights[f"{name}.weight"], hooks)
        embedding: Any = model.get_input_embeddings()
        hooks.enter_context(removed(embedding.register_forward_hook(lambda *said: said[-1].requires_grad_())))
        chances = torch.log_softmax(model(tokens, use_cache=False).logits.float(), -1)
        drawn = torch.multinomial(
            chances.detach().exp().flatten(0, 1), 1, generator=torch.Generator().manual_seed(0)
        ).view_as(tokens)
        chances.gather(-1, drawn[..., None]).sum().backward()  # type: ignore[no-untyped-call]
    watch.add_up(tokens.numel())
    return list(watch.products.values())


class Watch:
    """Listens to products as they run, and to the gradients of what they make."""

    def __init__(self, scheme: Scheme, inputs: bool) -> None:
        self.scheme, self.inputs = scheme, inputs
        self.products: dict[tuple[str, ...], Product] = {}
        self._runs: list[Run] = []
        self._last: dict[str, Run] = {}  # by the module around

    def see(self, name: str, module: torch.nn.Module, weight: Weight, hooks: ExitStack) -> None:
        if weight.dims[-1] < LEAST_INPUTS:
            return
        is_turned = isinstance(module, Conv1D)
        errors: list[torch.Tensor] = []

        def before(module: torch.nn.Module, values: tuple[torch.Tensor, ...]) -> None:
            """While a lent weight is there."""
            self._run_of(name, values[0]).names[f"{name}.weight"] = weight
            errors.append(self._error(values[0].detach(), module.get_parameter("weight"), is_turned))

        def behind(module: torch.nn.Module, values: tuple[torch.Tensor, ...], made: Any) -> None:
            run, error = self._run_of(name, values[0]), errors.pop()

            def take(gradient: torch.Tensor) -> None:
                run.add((gradient * error).sum(-1))

            if isinstance(made, torch.Tensor) and made.requires_grad:  # a router makes more than its product
                made.register_hook(take)  # type: ignore[no-untyped-call]

        hooks.enter_context(removed(module.register_forward_pre_hook(before)))
        hooks.enter_context(removed(module.register_forward_hook(behind)))

    def _run_of(self, name: str, x: torch.Tensor) -> Run:
        """Modules of one module that multiply the same tensor are one product."""
        parent = name.rpartition(".")[0]
        last = self._last.get(parent)
        if last is None or last.x() is not x:
            last = self._last[parent] = Run(weakref.ref(x))
            self._runs.append(last)
        return last

    def _error(self, x: torch.Tensor, weight: torch.Tensor, is_turned: bool) -> torch.Tensor:
        """What rounding does to x Wᵀ, in x's shape but for the last axis."""
        rows, matrix = x.reshape(-1, x.shape[-1]), (weight.T if is_turned else weight).contiguous()
        read = torch.from_numpy(round_inputs(rows.numpy(), self.scheme)) if self.inputs else rows
        rounded = torch.from_numpy(quantize(matrix.numpy(), self.scheme).values())
        return (read @ rounded.T - rows @ matrix.T).reshape(*x.shape[:-1], -1).bfloat16()  # they wait for a gradient

    def add_up(self, n_tokens: int) -> None:
        """Divide by tokens: divergences are means over positions."""
        for run in self._runs:
            product = self.products.setdefault(tuple(run.names), Product())
            product.weights |= run.names
            product.nats += run.squares() / 2 / n_tokens


class Run:
    """One time that a product runs.  names: of its weights."""

    def __init__(self, x: weakref.ref[torch.Tensor]) -> None:
        self.x, self.names = x, dict[str, Weight]()
        self._along: torch.Tensor | None = None  # g · Δ of each token

    def add(self, along: torch.Tensor) -> None:
        self._along = along if self._along is None else self._along + along

    def squares(self) -> float:
        return 0.0 if self._along is None else float(self._along.double().square().sum())


@contextmanager
def removed(hook: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """In it a hook is there."""
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def rereading(model: PreTrainedModel, weights: Mapping[str, Weight]) -> Iterator[None]:
    """In it autograd keeps no weight that a model was lent (frontend/as_torch.py), but reads it again."""
    lent: dict[int, Weight] = {}  # by where their numbers lie while a module runs

    def pack(tensor: torch.Tensor) -> Any:
        weight = lent.get(storage_of(tensor))
        return tensor if weight is None else (weight, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        weight, *where = packed
        return stored_as_tensor(weight, "f32").as_strided(*where)

    with ExitStack() as hooks:
        for prefix, module in model.named_modules():
            own = {key: weights.get(f"{prefix}.{key}".lstrip(".")) for key in module._parameters}
            lacking = [key for key, tensor in module._parameters.items() if tensor is not None and tensor.is_meta]
            if any(own[key] is not None for key in lacking):
                listen(module, own, lent, hooks)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def listen(
    module: torch.nn.Module, own: Mapping[str, Weight | None], lent: dict[int, Weight], hooks: ExitStack
) -> None:
    """Have a module's weights in `lent` while it runs."""
    places: list[int] = []

    def given(module: torch.nn.Module, _: Any) -> None:
        for key, weight in own.items():
            if weight is not None:
                places.append(storage_of(module._parameters[key]))
                lent[places[-1]] = weight

    def taken(*_: Any) -> None:
        while places:
            lent.pop(places.pop(), None)

    hooks.enter_context(removed(module.register_forward_pre_hook(given)))
    hooks.enter_context(removed(module.register_forward_hook(taken)))


def storage_of(tensor: Any) -> int:
    """Where a tensor's numbers lie, and those of its views."""
    place: int = tensor.untyped_storage().data_ptr()
    return place

"""4 bits and 8 in one artifact: which products get 8, so that weights take so many on average.

Divergences that roundings of single products cost add up, nearly (importance.py).  So products are taken in the order
of what a byte more saves there, as long as there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from llmc.compiler.quantization.quantize import QuantizedWeight, Scheme
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel


@dataclass
class Product:
    """Weights that are stored as one, since they multiply the same, and what 4 bits cost there.

    weights: by their parameter's name.  nats: the divergence.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    nats: float = 0.0

    def n_bytes(self, scheme: Scheme) -> int:
        return sum(stored_bytes(weight, scheme) for weight in self.weights.values())

    @property
    def n_weights(self) -> int:
        return sum(prod(weight.dims) for weight in self.weights.values())

    @property
    def keeps_codes(self) -> bool:
        """Whether a checkpoint has codes for it that 4 bits may hold."""
        return any(weight.coded is not None and weight.coded.bits <= 4 for weight in self.weights.values())


@dataclass(frozen=True)
class Choice:
    """wide: the names of parameters that get 8 bits.  bits: a weight has then, on average.  n_wide of n products;
    saved: of the nats that 4 bits cost all of them, by estimate."""

    wide: frozenset[str]
    bits: float
    n_wide: int
    n: int
    saved: float
    nats: float

    def __str__(self) -> str:
        share = self.saved / self.nats if self.nats else 0.0
        would = f"4 would have cost {share:.0%} of {self.nats:.2g} nats there, by estimate"
        return f"{self.n_wide} of {self.n} products are in 8 bits: {would}; {self.bits:.2f} bits a weight"


def with_wide(scheme: Scheme, source: SourceModel, *, inputs: bool) -> tuple[Scheme, list[str]]:
    """A scheme of so many bits, with the products of a model that get 8; and what to tell the user.

    inputs: whether kernels round what they multiply too, as CPUs' do.
    Raises LlmcError: fewer bits than all take, a model that makes no distributions.
    """
    place = f"--quant-bits {scheme.most_bits:g}"
    if source.file is not None or source.embedding is not None or source.classification is not None:
        fact = "which products get 8 bits is measured on the next token's distributions, by transformers"
        hint = "an .onnx file, a model for embeddings and one for labels are quantised without --quant-bits"
        raise LlmcError(fact, place=place, hint=hint)
    from llmc.compiler.quantization.importance import products_of

    choice = within_bits(*products_of(source, scheme, inputs=inputs), scheme, place)
    return replace(scheme, wide=choice.wide), [f"{place}: {choice}"]


def within_bits(products: Sequence[Product], others: Sequence[Weight], scheme: Scheme, place: str) -> Choice:
    """The products that get 8 bits, so that weights take scheme.most_bits on average.

    others: weights that are quantised too, and have 4 in any case.  Raises LlmcError: all in 4 bits are more already.
    """
    assert scheme.most_bits is not None
    n_weights = sum(product.n_weights for product in products) + sum(prod(weight.dims) for weight in others)
    n_bytes = sum(product.n_bytes(scheme) for product in products)
    n_bytes += sum(stored_bytes(weight, scheme) for weight in others)
    room = scheme.most_bits * n_weights / 8 - n_bytes
    if room < 0:
        fact = f"int4 in groups of {scheme.group} takes {8 * n_bytes / n_weights:.3f} bits a weight"
        hint = "ask for more, or for --quant-group 128" if scheme.group < 128 else "ask for more"
        raise LlmcError(fact, place=place, hint=hint)

    def more(product: Product) -> int:
        return product.n_bytes(scheme.in_8_bits) - product.n_bytes(scheme)

    chosen = []
    for product in sorted(products, key=lambda product: -product.nats / more(product)):
        if more(product) <= room and not product.keeps_codes:
            room -= more(product)
            n_bytes += more(product)
            chosen.append(product)
    wide = frozenset(name for product in chosen for name in product.weights)
    saved, nats = (sum(product.nats for product in some) for some in (chosen, products))
    return Choice(wide, 8 * n_bytes / n_weights, len(chosen), len(products), saved, nats)


def stored_bytes(weight: Weight, scheme: Scheme) -> int:
    """Bytes of a weight's codes, scales and zeros."""
    has_zeros = scheme.group > 0 and weight.coded is not None and weight.coded.has_zeros_of(scheme.group)
    return QuantizedWeight(weight, replace(scheme, zeros=has_zeros)).stored_bytes

"""The operators of linear layers: a product with what comes right after it, and with the norm right before it.

    {RMSNorm|LayerNorm}? Linear {Bias}? {Relu|Gelu|GeluTanh|Silu}? {Residual}?
    {RMSNorm|LayerNorm}? GatedLinear {Silu|Gelu|GeluTanh} {Bias}?
    {RMSNorm|LayerNorm}? LinearStrips {Bias}?                                        gate and up, before they meet

Their definitions are put together as their names are.  A norm may also be deferred, from x to the sums:
deferred_norm.py.  See __init__.py for what M, N and K are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import pi, sqrt
from typing import Any

import onnx_ir as ir

from llmc.compiler.kernel import STRIP
from llmc.compiler.ops.define import ATTRIBUTE_TYPES, Attributes, Dim, Dims, define

Body = Callable[..., Any]


def gelu(op: Any, x: Any) -> Any:
    """x/2 · (1 + erf(x / √2)).    Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    gate = op.Add(op.Erf(op.Mul(x, op.scalar(sqrt(0.5)))), op.scalar(1.0))
    return op.Mul(op.Mul(x, op.scalar(0.5)), gate)


def gelu_tanh(op: Any, x: Any) -> Any:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    inner = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), op.scalar(0.044715)))
    gate = op.Add(op.Tanh(op.Mul(inner, op.scalar(sqrt(2 / pi)))), op.scalar(1.0))
    return op.Mul(op.Mul(x, op.scalar(0.5)), gate)


ACTIVATIONS: dict[str, Callable[[Any, ir.Value], Any]] = {
    "": lambda op, x: x,
    "Relu": lambda op, x: op.Relu(x),
    "Gelu": gelu,
    "GeluTanh": gelu_tanh,
    "Silu": lambda op, x: op.Mul(x, op.Sigmoid(x)),
}
"""An activation as the names of operators spell it, and its definition."""

GATES = ("Silu", "Gelu", "GeluTanh")


def linear_name(bias: bool = False, activation: str = "", residual: bool = False) -> str:
    """`Linear[Bias][Relu|Gelu|GeluTanh|Silu][Residual]`."""
    return f"Linear{'Bias' * bias}{activation}{'Residual' * residual}"


def linear_parts(name: str) -> tuple[bool, str, bool] | None:
    """(bias, activation, residual) of an operator of the Linear family; None for any other."""
    return LINEARS.get(name)


LINEARS = {
    linear_name(*parts): parts
    for parts in product((False, True), ACTIVATIONS, (False, True))  # bias, activation, residual
}


# -- the norm in front ---------------------------------------------------------------------------------------------

NORMS = {"RMSNorm": ("norm_weight",), "LayerNorm": ("norm_weight", "norm_bias")}
"""A norm as the names of operators spell it, and the inputs that it adds behind x."""

STANDARD_NORMS = {"RMSNorm": "RMSNormalization", "LayerNorm": "LayerNormalization"}


def normed_name(norm: str, product: str) -> str:
    """`RMSNormLinear…`, `LayerNormGatedLinear…`: a product of x normalised."""
    return f"{norm}{product}"


def normed_parts(name: str) -> tuple[str, str]:
    """(norm, product) of an operator's name; the norm is "" where there is none."""
    norm = next((norm for norm in NORMS if name.startswith((f"{norm}Linear", f"{norm}Gated"))), "")
    return norm, name.removeprefix(norm)


# -- definitions ---------------------------------------------------------------------------------------------------


def define_linear(name: str, bias: bool, activation: str, residual: bool) -> None:
    """act(x Wᵀ + bias) + residual.    x [M, K], W [N, K], bias [N], residual [M, N] -> [M, N]."""

    def body(op: Any, x: ir.Value, weight: ir.Value, *rest: ir.Value) -> Any:
        more: Iterator[ir.Value] = iter(rest)
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        y = op.Add(y, next(more)) if bias else y
        y = ACTIVATIONS[activation](op, y)
        return op.Add(y, next(more)) if residual else y

    product = f"x Wᵀ{' + bias' * bias}"
    equation = f"{activation.lower()}({product})" if activation else product
    shapes = f"x [M, K], W [N, K]{', bias [N]' * bias}{', residual [M, N]' * residual} -> [M, N]."
    doc = f"{equation}{' + residual' * residual}.    {shapes}"
    define_alone_and_normed(name, ["weight", *["bias"] * bias, *["residual"] * residual], body, full, doc)


def define_gated_linear(name: str, activation: str, bias: bool) -> None:
    """act(x Wgᵀ + bg) · (x Wuᵀ + bu), W = [Wg; Wu].    x [M, K], W [2N, K], bias [2N] -> [M, N]."""

    def body(op: Any, x: ir.Value, weight: ir.Value, *rest: ir.Value) -> Any:
        both = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return finish_gated(activation)(op, op.Add(both, *rest) if bias else both)

    gate = f"{activation.lower()}(x Wgᵀ{' + bg' * bias})"
    doc = (
        f"{gate} · (x Wuᵀ{' + bu' * bias}), W = [Wg; Wu] by rows{', bias = [bg; bu]' * bias}.    "
        f"x [M, K], W [2N, K]{', bias [2N]' * bias} -> [M, N].    Shazeer 2020, arXiv:2002.05202."
    )
    define_alone_and_normed(name, ["weight", *["bias"] * bias], body, half, doc)


def finish_gated(activation: str) -> Body:
    """act(gate) · up of sums whose halves they are."""

    def body(op: Any, both: ir.Value) -> Any:
        gate, up = op.Split(both, axis=-1, num_outputs=2, n_results=2)
        return op.Mul(ACTIVATIONS[activation](op, gate), up)

    return body


def strips_name(bias: bool) -> str:
    """`LinearStrips[Bias]`."""
    return f"LinearStrips{'Bias' * bias}"


def in_strips(op: Any, both: ir.Value) -> Any:
    """8 columns of the first half, then those 8 of the second, and so on."""
    parts = op.Transpose(op.Reshape(both, op.ints(0, 2, -1, STRIP)), perm=[0, 2, 1, 3])
    return op.Reshape(parts, op.ints(0, -1))


def out_of_strips(op: Any, strips: ir.Value) -> Any:
    """The halves again, one behind the other."""
    parts = op.Transpose(op.Reshape(strips, op.ints(0, -1, 2, STRIP)), perm=[0, 2, 1, 3])
    return op.Reshape(parts, op.ints(0, -1))


def define_strips(name: str, bias: bool) -> None:
    """x Wᵀ + bias of a gated weight, its columns in strips.    x [M, K], W [2N, K], bias [2N] -> [M, 2N]."""

    def body(op: Any, x: ir.Value, weight: ir.Value, *rest: ir.Value) -> Any:
        both = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return in_strips(op, op.Add(both, *rest) if bias else both)

    doc = (
        f"x Wᵀ{' + bias' * bias}, W = [Wg; Wu] by rows; {STRIP} columns of the gate, then those of up, and so on.    "
        f"x [M, K], W [2N, K]{', bias [2N]' * bias}, N a multiple of {STRIP} -> [M, 2N]."
    )
    define_alone_and_normed(name, ["weight", *["bias"] * bias], body, full, doc)


def define_alone_and_normed(name: str, inputs: list[str], body: Body, width: Callable[[Dim], Dim], doc: str) -> None:
    """Register a product of x and `inputs`, and the same of x normalised.  width: of the result, from the weight's."""

    def shapes(weight_at: int) -> Callable[[Sequence[Dims], Attributes], Sequence[Dims]]:
        return lambda s, _: [(*s[0][:-1], width(s[weight_at][0]))]

    define(name, ["x", *inputs], {}, body, shapes(1), doc)
    for norm, parameters in NORMS.items():

        def normed_body(op: Any, x: ir.Value, *rest: ir.Value, epsilon: Any, norm: str = norm) -> Any:
            n = len(NORMS[norm])
            normed = getattr(op, STANDARD_NORMS[norm])(x, *rest[:n], axis=-1, epsilon=epsilon)
            return body(op, normed, *rest[n:])

        define(
            normed_name(norm, name),
            ["x", *parameters, *inputs],
            {"epsilon": ATTRIBUTE_TYPES["float"]},
            normed_body,
            shapes(1 + len(parameters)),
            f"{norm}(x), then {name}: {doc}",
        )


def gated_linear_name(activation: str, bias: bool) -> str:
    """`GatedLinear{Silu|Gelu|GeluTanh}[Bias]`."""
    return f"GatedLinear{activation}{'Bias' * bias}"


def full(size: Dim) -> Dim:
    return size


def half(size: Dim) -> int:
    assert isinstance(size, int)
    assert size % 2 == 0
    return size // 2


for _name, _parts in LINEARS.items():
    define_linear(_name, *_parts)
for _activation, _bias in product(GATES, (False, True)):
    define_gated_linear(gated_linear_name(_activation, _bias), _activation, _bias)
for _bias in (False, True):
    define_strips(strips_name(_bias), _bias)

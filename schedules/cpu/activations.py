"""Activation functions on float32 vectors in TIR."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from llmc.schedules.cpu.lanes import Lanes

ERF_NUMERATOR = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_DENOMINATOR = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
"""erf(x) = x P(x²) / Q(x²) on [-4, 4], highest power first; the error is below 3e-7.  The coefficients are Eigen's."""

ERF_LIMIT = 4.0
SQRT_HALF = 0.7071067811865476
GELU_TANH_LINEAR = 1.5957691216057308  # 2 sqrt(2 / pi)
GELU_TANH_CUBIC = GELU_TANH_LINEAR * 0.044715


def relu(v: Lanes, x: Any) -> Any:
    """max(x, 0)."""
    return T.max(x, v.all(0.0))


def silu(v: Lanes, x: Any) -> Any:
    """x / (1 + e**-x)."""
    return x / (v.all(1.0) + v.exp(v.all(0.0) - x))


def gelu(v: Lanes, x: Any) -> Any:
    """x / 2 · (1 + erf(x / sqrt 2))."""
    return x * v.fma(v.all(0.5), erf(v, x * v.all(SQRT_HALF)), v.all(0.5))


def gelu_tanh(v: Lanes, x: Any) -> Any:
    """x / 2 · (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x³), written as x / (1 + e**-2u)."""
    x = T.bind(x)
    twice_u = x * v.fma(x * x, v.all(GELU_TANH_CUBIC), v.all(GELU_TANH_LINEAR))
    return x / (v.all(1.0) + v.exp(v.all(0.0) - twice_u))


def erf(v: Lanes, x: Any) -> Any:
    """The error function; the absolute error is below 3e-7."""
    x = T.bind(T.max(T.min(x, v.all(ERF_LIMIT)), v.all(-ERF_LIMIT)))
    square = T.bind(x * x)
    return x * _polynomial(v, square, ERF_NUMERATOR) / _polynomial(v, square, ERF_DENOMINATOR)


def _polynomial(v: Lanes, x: Any, coefficients: tuple[float, ...]) -> Any:
    """Horner's scheme, highest power first."""
    value = v.all(coefficients[0])
    for coefficient in coefficients[1:]:
        value = v.fma(value, x, v.all(coefficient))
    return value


ACTIVATIONS = {"": lambda v, x: x, "Relu": relu, "Silu": silu, "Gelu": gelu, "GeluTanh": gelu_tanh}
"""By the names that operators spell them with."""

"""What a call of a norm says, alone or behind an addition, for the schedules of every target.

RMSNormalization(x, weight)                     x / sqrt(mean(x²) + e) · weight         Zhang and Sennrich 2019
LayerNormalization(x, weight[, bias])           (x - mean) / sqrt(var + e) · weight + bias     Ba et al. 2016
llmc.AddRMSNorm, llmc.AddLayerNorm              the same of s = x + residual; results s and the norm
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmc.compiler.kernel import Call, Layout, Operand, RowMajor

OPERATORS = {
    "RMSNormalization": (False, False),
    "LayerNormalization": (True, False),
    "llmc.AddRMSNorm": (False, True),
    "llmc.AddLayerNorm": (True, True),
}
"""Whether the mean is taken away, and whether a residual is added first."""


@dataclass(frozen=True)
class NormCall:
    """`rows` rows of `columns` elements.  centred: LayerNorm; adds: x + residual first; bias: added last."""

    rows: int
    columns: int
    centred: bool
    adds: bool
    bias: bool
    epsilon: float

    @property
    def first_vector(self) -> int:
        """Which input is the weight: behind x and the residual."""
        return 2 if self.adds else 1

    @property
    def operands(self) -> tuple[Operand, ...]:
        """x, [residual], weight, [bias], then the sum, if there is one, and the norm."""
        inputs = (Operand("input", index) for index in range(self.first_vector + 1 + self.bias))
        return (*inputs, *(Operand("output", index) for index in range(1 + self.adds)))


def parse(call: Call) -> NormCall | None:
    """None: another call, or a norm that is not over the last axis of float32 by vectors of its length."""
    if call.op not in OPERATORS:
        return None
    centred, adds = OPERATORS[call.op]
    x, *others = call.inputs
    if x is None or x.dtype != "f32" or call.attribute("axis", -1) not in (-1, len(x.shape) - 1):
        return None
    columns = x.shape[-1]
    vectors = others[1:] if adds else others
    if any(v.shape != (columns,) or not (v.constant or v.dtype == "f32") for v in vectors if v):
        return None
    bias = len(vectors) > 1 and vectors[1] is not None
    return NormCall(prod(x.shape[:-1]), columns, centred, adds, bias, float(call.attribute("epsilon", 1e-5)))


def vector_layouts(call: Call, norm: NormCall) -> dict[int, Layout]:
    """How the weight and the bias lie in an artifact, as far as they are constants."""
    vectors = {index: call.inputs[index] for index in range(norm.first_vector, norm.first_vector + 1 + norm.bias)}
    return {index: RowMajor("f32") for index, vector in vectors.items() if vector and vector.constant}

"""Norms over the last axis, alone or after a residual addition.

    RMSNormalization(x, weight)                     x / sqrt(mean(x²) + e) · weight         Zhang and Sennrich 2019
    LayerNormalization(x, weight[, bias])           (x - mean) / sqrt(var + e) · weight + bias     Ba et al. 2016
    llmc.AddRMSNorm, llmc.AddLayerNorm              the same of s = x + residual; results s and the norm

One launch (row_kernels.py), one row a unit.  Reads each operand and writes each result once from memory: 8 C bytes a
row (16 C with the addition); the row's second and third pass find it in the first level cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

OPERATORS = {
    "RMSNormalization": (False, False),
    "LayerNormalization": (True, False),
    "llmc.AddRMSNorm": (False, True),
    "llmc.AddLayerNorm": (True, True),
}
"""Whether the mean is taken away, and whether a residual is added first."""


@dataclass(frozen=True)
class Norm:
    """`rows` rows of `columns` elements.  centred: LayerNorm; adds: x + residual first; bias: added last."""

    rows: int
    columns: int
    centred: bool
    adds: bool
    bias: bool
    epsilon: float
    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} lanes"


def match(call: Call, target: Target) -> Norm | None:
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
    epsilon = float(call.attribute("epsilon", 1e-5))
    return Norm(prod(x.shape[:-1]), columns, centred, adds, bias, epsilon, target.lanes)


def implement(call: Call, norm: Norm, target: Target) -> Implementation:
    first_vector = 2 if norm.adds else 1
    inputs = range(first_vector + 1 + norm.bias)
    operands = [Operand("input", index) for index in inputs] + [Operand("output", i) for i in range(1 + norm.adds)]
    words = norm.rows * norm.columns * (4 if norm.adds else 2) + norm.columns * (1 + norm.bias)
    kind = f"{'add_' * norm.adds}{'layer' if norm.centred else 'rms'}_norm{'_bias' * norm.bias}"
    key = f"build_norm({norm!r})"
    name = f"{kind}_{norm.rows}x{norm.columns}_{short_hash(key)}"
    launch = Launch(
        Kernel(name, key, partial(build_norm, norm)),
        tuple(operands),
        norm.rows,
        4 * words,
        norm.rows * norm.columns * (7 if norm.centred else 4),
    )
    constants = [i for i in inputs if i >= first_vector and (vector := call.inputs[i]) and vector.constant]
    return Implementation((launch,), layouts={index: RowMajor("f32") for index in constants})


def build_norm(norm: Norm) -> Any:
    from llmc.schedules.cpu import row_kernels  # TVM is imported only when something is compiled

    return row_kernels.norm_kernel(norm)


RULES = (Rule("norm", match, implement),)

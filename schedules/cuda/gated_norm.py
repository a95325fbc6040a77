"""Rows normalised and multiplied by silu of their gates on a GPU, in one launch: llmc.GatedRMSNorm, a warp a row
(include/gated_norm.cuh).  All is f32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil, prod

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.schedules.rule import Rule

WARPS = 4


@dataclass(frozen=True)
class GatedNorm:
    """`rows` rows of `columns` elements."""

    rows: int
    columns: int
    epsilon: float

    def __str__(self) -> str:
        return "a warp a row"


def match(call: Call, target: Target) -> GatedNorm | None:
    x = call.inputs[0] if call.op == "llmc.GatedRMSNorm" else None
    if x is None or any(kind is None or kind.tiled for kind in (*call.inputs, *call.outputs)):
        return None
    return GatedNorm(prod(x.shape[:-1]), x.shape[-1], float(call.attribute("epsilon")))


def implement(call: Call, norm: GatedNorm, target: Target) -> Implementation:
    key = f"gated_norm_source({norm!r})"
    name = f"gated_rmsnorm_{norm.rows}x{norm.columns}_{short_hash(key)}"
    kernel = Kernel(name, key, partial(gated_norm_source, name, norm), n_threads=32 * WARPS, dependent=True)
    size, operands = norm.rows * norm.columns, (*(Operand("input", index) for index in range(3)), Operand("output"))
    launch = Launch(kernel, operands, ceil(norm.rows / WARPS), 12 * size + 4 * norm.columns, 8 * size)
    return Implementation((launch,), layouts={2: RowMajor("f32")})


def gated_norm_source(name: str, norm: GatedNorm) -> str:
    """The kernel's CUDA C++."""
    return (
        '#include "gated_norm.cuh"\n\n'
        "struct Rows {\n"
        f"    static constexpr int kRows = {norm.rows}, kColumns = {norm.columns};\n"
        f"    static constexpr float kEpsilon = {norm.epsilon!r}f;\n"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * WARPS})\n'
        f"{name}(const float *x, const float *z, const float *weight, float *y) {{\n"
        "    gated_norm<Rows>(x, z, weight, y);\n}\n"
    )


RULES = (Rule("gated_norm", match, implement),)

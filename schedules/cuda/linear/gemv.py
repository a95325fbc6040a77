"""Linear layers of up to 16 tokens on a GPU, bound by the weight's bytes: include/gemv.cuh says how it is done.

    norm    (M <= 8) each block normalises x for itself, while its first weights are on their way; or it is deferred
            to the sums, and prepared by the product in front (include/gemv_norm.cuh)
    multiply on tensor cores, weights copied far ahead, each lane's own, in the order of its registers
    finish  bias, activation, gate and residual in registers

Bytes: the weight once; x once a block, from L2; y.
"""

from __future__ import annotations

from functools import partial

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, RowMajor, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES
from llmc.schedules.cuda.linear.gemv_params import Gemv, resident_blocks, shared_bytes, x_bytes
from llmc.schedules.cuda.linear.gemv_space import space
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.cuda.linear.operands import epilogue, is_folded, layouts, other_parameters, others
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.cuda.source import C_TYPES

__all__ = ["Gemv", "default_params", "implement", "space", "takes_norm"]

MOST_TOKENS = 16
MOST_NORMED_TOKENS = 8
"""For more tokens a norm is a launch of its own, rather than each block's first work."""

LEAST_RING_BYTES = 40 << 10
"""The least shared memory beside x: for the smallest rings, and sums."""


def default_params(op: LinearOp, target: Target) -> Gemv:
    """What is best on paper."""
    return space(op, target)[0]


def takes_norm(op: LinearOp, target: Target) -> bool:
    """Whether the kernel can normalise, or round, x itself: it must fit shared memory."""
    tokens = MOST_NORMED_TOKENS if op.norm else MOST_TOKENS
    return op.m <= tokens and x_bytes(op) <= DEVICES[target.arch].shared_bytes - LEAST_RING_BYTES


def implement(call: Call, op: LinearOp, params: Gemv, target: Target) -> Implementation:
    """One launch."""
    form = weight_format(op)
    inputs = [op.weight_input, op.scaled_input if op.deferred else 0, *norm_inputs(op)]
    operands = (*(Operand("input", index) for index in inputs), *(operand for _, _, operand in others(op)))
    kernel = gemv_kernel(op, params, resident_blocks(op, params, DEVICES[target.arch]))
    launch = Launch(kernel, operands, params.blocks, form.n_bytes + op.vector_bytes, op.n_operations)
    norm_layouts: dict[int, Layout] = {index: RowMajor("f32") for index in norm_inputs(op)}
    return Implementation((launch,), layouts={**layouts(op), **norm_layouts}, family=params.family())


def norm_inputs(op: LinearOp) -> range:
    """Vectors of the norm that each block puts on x."""
    return range(1, 1 if op.deferred else op.weight_input)


def gemv_kernel(op: LinearOp, params: Gemv, resident: int) -> Kernel:
    """resident: blocks that a multiprocessor shall have room for."""
    key = f"gemv_source({op!r}, {params!r}, {resident})"
    name = f"gemv_{op.weight}_{op.words}_{short_hash(key)}"
    build = partial(gemv_source, name, op, params, resident)
    return Kernel(name, key, build, 32 * params.warps, shared_bytes(op, params), dependent=True)


def gemv_source(name: str, op: LinearOp, params: Gemv, resident: int) -> str:
    """The kernel's CUDA C++."""
    form = weight_format(op)
    element = C_TYPES[op.element]
    x, y = (element if tiled else "float" for tiled in (op.tiled_x, op.tiled_y))
    vectors = ["norm_weight", "norm_bias"][: len(norm_inputs(op))]
    parameters = ["const unsigned char *weight", f"const {x} *x", *(f"const float *{vector}" for vector in vectors)]
    norm_weight, norm_bias = [*vectors, "nullptr", "nullptr"][:2]
    flags = {
        "kGated": op.gated,
        "kBias": op.bias or is_folded(op),
        "kResidual": op.residual,
        "kMoments": op.moments,
        "kDeferred": op.deferred,
        "kTiledX": op.tiled_x,
        "kNormBias": op.norm == "layer",
        "kSharedX": params.shared_x,
        "kEarly": params.early,
        "kDigits": params.digits,
        "kBulk": params.bulk,
        "kKept": params.kept,
    }
    sizes = f"kWarps = {params.warps}, kStages = {params.stages}, kSide = {params.side}, kDepth = {params.depth}"
    grid = f"kBlocks = {params.blocks}, kSplit = {params.split}, kAhead = {params.ahead}"
    clusters = f"__cluster_dims__({params.split}, 1, 1) " if params.split > 1 else ""
    headers = ["gemv.cuh", *["gemv_zeros.cuh"] * (op.weight == "z4")]
    includes = "".join(f'#include "{header}"\n\n' for header in headers)
    return (
        f"{includes}struct Layer {{\n"
        f"    using T = {element};\n"
        f"    using Y = {y};\n"
        f"    using Weight = {form.c_type};\n"
        f"    static constexpr int kM = {op.m}, kN = {op.n}, kK = {op.k};\n"
        f"    static constexpr bool {', '.join(f'{flag} = {c_bool(value)}' for flag, value in flags.items())};\n"
        f"    static constexpr Activation kActivation = Activation::{op.activation};\n"
        f"    static constexpr Norm kNorm = Norm::{op.norm or 'none'};\n"
        f"    static constexpr float kEpsilon = {op.epsilon!r}f;\n"
        f"    static constexpr int {sizes}, {grid};\n"
        "};\n\n"
        f'extern "C" __global__ void {clusters}__launch_bounds__({32 * params.warps}, {resident})\n'
        f"{name}({', '.join(parameters)}{other_parameters(op)}) {{\n"
        f"    gemv<Layer>({{weight, x, {norm_weight}, {norm_bias}, {epilogue(op)}}});\n"
        "}\n"
    )

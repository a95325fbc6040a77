"""Linear layers of more than 16 tokens on a GPU: y = act(x Wᵀ + bias) + residual, and gated ones.

    on Hopper by wgmma, weights streamed by bulk copies          include/gemm_wgmma.cuh
    on others by mma.sync, fetched by cp.async                   include/gemm_mma.cuh
    weights in f32 by ordinary multiply-adds                     include/gemm_fma.cuh

x lies in tiles already, in the weight's type (linear.py sees to it).  One layout of the weight serves these and the
GEMV (tile_layout.py); how the product is cut up: gemm_tiles.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from math import ceil

from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Layout, Operand, RowMajor
from llmc.compiler.target import Target
from llmc.schedules.cuda import gemm_tiles
from llmc.schedules.cuda.gemm_tiles import Tiling
from llmc.schedules.cuda.linear_op import LinearOp
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.cuda.source import C_TYPES
from llmc.schedules.cuda.tile_layout import GatedTiles, Tiles

FMA_THREADS, FMA_TILE = 256, 64


def default_params(op: LinearOp, target: Target) -> Tiling:
    """The tiling that is best on paper."""
    return gemm_tiles.default_tiling(op, target)


def space(op: LinearOp, target: Target) -> Iterable[Tiling]:
    """Tilings worth measuring, the best on paper first; nothing to choose for weights in f32."""
    return gemm_tiles.space(op, target) if op.element != "f32" else ()


def implement(call: Call, op: LinearOp, params: Tiling, target: Target) -> Implementation:
    """The launch for a product whose x lies as it is multiplied: in tiles, or in f32 for weights in f32."""
    assert not op.norm, "norms go in front"
    assert op.tiled_x == (op.element != "f32")
    operands = [Operand("input", 0), Operand("input", op.weight_input), *_vectors(op), Operand("output", 0)]
    if op.element == "f32":
        grid = ceil(op.m / FMA_TILE) * ceil(op.n / FMA_TILE)
        launch = Launch(_f32_kernel(op), tuple(operands), grid, 4 * op.rows * op.k + op.vector_bytes, op.n_operations)
        return Implementation((launch,), layouts=layouts(op), family="GEMM")
    temps = []
    if params.n_parts(op):
        operands += [Operand("temp", 0), Operand("scratch")]
        temps.append(params.parts_bytes(op))
    kernel = _product_kernel(op, params, target)
    n_bytes = gemm_tiles.weight_bytes(op) + op.vector_bytes
    return Implementation(
        (Launch(kernel, tuple(operands), params.blocks, n_bytes, op.n_operations),),
        tuple(temps),
        params.counter_bytes(op),
        layouts(op),
        family="flat GEMM" if op.m <= gemm_tiles.FLAT_TOKENS else "GEMM",
    )


def layouts(op: LinearOp) -> dict[int, Layout]:
    """How the call's constants must lie."""
    weight: Layout = RowMajor("f32")
    if op.element != "f32":
        weight = GatedTiles(op.element) if op.gated else Tiles(op.element)
    bias: dict[int, Layout] = {op.bias_input: RowMajor("f32")} if op.bias else {}
    return {op.weight_input: weight, **bias}


def _vectors(op: LinearOp) -> list[Operand]:
    """Bias and residual, where there are any."""
    inputs = [*[op.bias_input] * op.bias, *[op.residual_input] * op.residual]
    return [Operand("input", index) for index in inputs]


# -- the product ---------------------------------------------------------------------------------------------------


def _product_kernel(op: LinearOp, params: Tiling, target: Target) -> Kernel:
    kind, n_threads = ("Wgmma", 384) if gemm_tiles.DEVICES[target.arch].wgmma else ("Mma", 256)
    cut = f"{params.tokens}, {params.stages}, {params.blocks}, {params.n_shared(op)}, {params.band}, {params.cluster}"
    shared_bytes = gemm_tiles.shared_bytes(op, params.tokens, params.stages)
    declarations = (
        f"using Cut = Tiling<Layer, {cut}>;\n"
        f'static_assert(sizeof({kind}Shared<Cut>) <= {shared_bytes}, "the launch asks for enough");\n\n'
    )
    element, is_cut = C_TYPES[op.element], params.n_parts(op) > 0
    parts = ", float4 *parts, uint32_t *counters" if is_cut else ""
    arguments = f"x, weight, {_epilogue(op)}, {'parts, counters' if is_cut else 'nullptr, nullptr'}"
    return _kernel(
        f"gemm_{op.element}_{op.words}",
        f"gemm_{kind.lower()}.cuh",
        _layer(op) + declarations,
        f"const {element} *x, const {element} *weight{_vector_parameters(op)}{parts}",
        f"gemm_{kind.lower()}<Cut>({arguments});",
        n_threads,
        shared_bytes,
        params.cluster,
    )


def _f32_kernel(op: LinearOp) -> Kernel:
    parameters = f"const float *x, const float *weight{_vector_parameters(op)}"
    body = f"gemm_fma<Layer>(x, weight, {_epilogue(op)});"
    return _kernel(f"gemm_f32_{op.words}", "gemm_fma.cuh", _layer(op), parameters, body, FMA_THREADS, 0)


# -- source --------------------------------------------------------------------------------------------------------


def _layer(op: LinearOp) -> str:
    """The layer as the headers want it described."""
    element = C_TYPES[op.element]
    flags = f"kGated = {c_bool(op.gated)}, kBias = {c_bool(op.bias)}, kResidual = {c_bool(op.residual)}"
    return (
        "struct Layer {\n"
        f"    using T = {element};\n"
        f"    using Y = {element if op.tiled_y else 'float'};\n"
        f"    static constexpr int kM = {op.m}, kN = {op.n}, kK = {op.k};\n"
        f"    static constexpr bool {flags};\n"
        f"    static constexpr Activation kActivation = Activation::{op.activation};\n"
        "};\n\n"
    )


def _epilogue(op: LinearOp) -> str:
    return f"Epilogue<Layer>{{{'bias' if op.bias else 'nullptr'}, {'residual' if op.residual else 'nullptr'}, y}}"


def _vector_parameters(op: LinearOp) -> str:
    """Parameters for bias, residual and y, each with a comma before it."""
    bias = ", const float *bias" * op.bias
    residual = ", const float *residual" * op.residual
    return f"{bias}{residual}, {C_TYPES[op.element] if op.tiled_y else 'float'} *y"


def _kernel(
    name: str,
    header: str,
    declarations: str,
    parameters: str,
    body: str,
    n_threads: int,
    shared_bytes: int,
    cluster: int = 1,
) -> Kernel:
    """A kernel whose name ends with the hash of its source, so that tilings can coexist."""
    key = f"{header} {declarations} {parameters} {body} {n_threads} {shared_bytes}"
    name = f"{name}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    clusters = f"__cluster_dims__({cluster}, 1, 1) " if cluster > 1 else ""
    source = (
        f'#include "{header}"\n\n{declarations}'
        f'extern "C" __global__ void {clusters}__launch_bounds__({n_threads}, 1)\n'
        f"{name}({parameters}) {{\n    {body}\n}}\n"
    )
    return Kernel(name, key, partial(str, source), n_threads, shared_bytes, dependent=True)

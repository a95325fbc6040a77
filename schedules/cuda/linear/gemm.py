"""Linear layers of more than 16 tokens on a GPU: y = act(x Wᵀ + bias) + residual, and gated ones.

    on Hopper by wgmma, weights streamed by bulk copies          include/gemm_wgmma.cuh
        quantised weights, from registers                        include/gemm_wgmma_codes.cuh
    on others by mma.sync, fetched by cp.async                   include/gemm_mma.cuh
    weights in f32 by ordinary multiply-adds                     include/gemm_fma.cuh

x lies in tiles already, in what is multiplied (rule.py sees to it).  One layout of the weight serves these and the
GEMV (gemv_weight.py); how the product is cut up: gemm_tiles.py, gemm_prompts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import ceil

from llmc.compiler.kernel import TILE_COLUMNS, Call, Implementation, Kernel, Launch, Operand, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.linear import gemm_prompts, gemm_tiles
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.cuda.linear.operands import epilogue, is_folded, layouts, other_parameters, others
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.cuda.source import C_TYPES

FMA_THREADS, FMA_TILE = 256, 64


def default_params(op: LinearOp, target: Target) -> Tiling:
    """The tiling that is best on paper; the one there is for weights in f32."""
    if op.element == "f32":
        return Tiling(FMA_TILE, 1, ceil(op.m / FMA_TILE) * ceil(op.n / FMA_TILE), shared=False)
    return gemm_prompts.space(op, target)[0]


def space(op: LinearOp, target: Target) -> Iterable[Tiling]:
    """Tilings worth measuring, the best on paper first; nothing to choose for weights in f32."""
    return gemm_prompts.space(op, target) if op.element != "f32" else ()


def implement(call: Call, op: LinearOp, params: Tiling, target: Target) -> Implementation:
    """The launch for a product whose x lies as it is multiplied: in tiles, or in f32 for weights in f32."""
    assert op.deferred or not op.norm, "other norms go in front"
    assert op.tiled_x == (op.element != "f32")
    x = Operand("input", op.scaled_input if op.deferred else 0)
    operands = [x, Operand("input", op.weight_input), *(operand for _, _, operand in others(op))]
    if op.element == "f32":
        n_bytes = 4 * op.rows * op.k + op.vector_bytes
        launch = Launch(_f32_kernel(op), tuple(operands), params.blocks, n_bytes, op.n_operations)
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
        op.append.layer_bytes if op.append else 0,
        family="flat GEMM" if op.m <= gemm_tiles.FLAT_TOKENS else "GEMM",
    )


# -- the product ---------------------------------------------------------------------------------------------------


def _product_kernel(op: LinearOp, params: Tiling, target: Target) -> Kernel:
    kind, n_threads = ("Wgmma", 384) if gemm_tiles.DEVICES[target.arch].wgmma else ("Mma", 256)
    function = f"gemm_{kind.lower()}{'_codes' if kind == 'Wgmma' and op.weight != op.element else ''}"
    numbers = (params.tokens, params.stages, params.blocks, params.n_shared(op), params.band, params.cluster)
    cut = ", ".join([*map(str, numbers), *special(params)])
    shared_bytes = params.shared_bytes(op)
    declarations = (
        f"using Cut = Tiling<Layer, {cut}>;\n"
        f'static_assert(sizeof({kind}Shared<Cut>) <= {shared_bytes}, "the launch asks for enough");\n\n'
    )
    element, is_cut = C_TYPES[op.element], params.n_parts(op) > 0
    parts = ", float4 *parts, uint32_t *counters" if is_cut else ""
    arguments = f"x, weight, {epilogue(op)}, {'parts, counters' if is_cut else 'nullptr, nullptr'}"
    return kernel_of(
        f"gemm_{op.weight}_{op.words}",
        f"{function}.cuh",
        layer_source(op, taken(op)) + declarations,
        f"const {element} *x, const void *weight{other_parameters(op)}{parts}",
        f"{function}<Cut>({arguments});",
        n_threads,
        shared_bytes,
        params.cluster,
    )


def special(params: Tiling) -> list[str]:
    """The last arguments of include/gemm_tile.cuh's Tiling, up to the last one that is not what it is anyway."""
    n = 3 if params.quick else 2 if params.turns else 1 if params.along else 0
    return [c_bool(params.along), str(params.turns), c_bool(params.quick)][:n]


def _f32_kernel(op: LinearOp) -> Kernel:
    parameters = f"const float *x, const float *weight{other_parameters(op)}"
    body = f"gemm_fma<Layer>(x, weight, {epilogue(op)});"
    return kernel_of(f"gemm_f32_{op.words}", "gemm_fma.cuh", layer_source(op), parameters, body, FMA_THREADS, 0)


# -- source --------------------------------------------------------------------------------------------------------


def taken(op: LinearOp) -> str:
    """A member that says how wide the parts of x are whose moments come from a GEMV; a GEMM's are a tile wide."""
    is_gemvs = op.deferred and op.part != TILE_COLUMNS
    return f"    static constexpr int kTakenPart = {op.part};\n" if is_gemvs else ""


def layer_source(op: LinearOp, members: str = "") -> str:
    """The layer as the headers want it described.  members: of it besides."""
    element = C_TYPES[op.element]
    weight = f"    using Weight = {weight_format(op).c_type};\n" if op.element != "f32" else ""
    heads = "    using Heads = Shape;\n" if op.append else ""
    flags = {
        "kGated": op.gated,
        "kBias": op.bias or is_folded(op),
        "kResidual": op.residual,
        "kMoments": op.moments,
    }
    return (
        f"{_zeros(op)}{_appended(op)}struct Layer {{\n"
        f"    using T = {element};\n"
        f"    using Y = {element if op.tiled_y else 'float'};\n"
        f"{weight}{heads}"
        f"    static constexpr int kM = {op.m}, kN = {op.n}, kK = {op.k};\n"
        f"    static constexpr bool {', '.join(f'{flag} = {c_bool(value)}' for flag, value in flags.items())};\n"
        f"    static constexpr Activation kActivation = Activation::{op.activation};\n"
        f"    static constexpr Norm kNorm = Norm::{op.norm or 'none'};\n"
        f"    static constexpr float kEpsilon = {op.epsilon!r}f;\n{members}"
        "};\n\n"
    )


def _zeros(op: LinearOp) -> str:
    """What operands of int4 with zeros are made by."""
    return '#include "gemm_zeros.cuh"\n\n' if op.weight == "z4" else ""


def _appended(op: LinearOp) -> str:
    """How a product ends that appends, and the attention whose queries, keys and values it makes."""
    return f'#include "gemm_append.cuh"\n\n{op.append.source()}\n\n' if op.append else ""


def kernel_of(
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
    name = f"{name}_{short_hash(key)}"
    clusters = f"__cluster_dims__({cluster}, 1, 1) " if cluster > 1 else ""
    source = (
        f'#include "{header}"\n\n{declarations}'
        f'extern "C" __global__ void {clusters}__launch_bounds__({n_threads}, 1)\n'
        f"{name}({parameters}) {{\n    {body}\n}}\n"
    )
    return Kernel(name, key, partial(str, source), n_threads, shared_bytes, dependent=True)

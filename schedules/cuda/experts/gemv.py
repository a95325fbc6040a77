"""Mixtures of experts at few tokens on a GPU, bound by the bytes of chosen experts: include/experts_gemv.cuh.

    gate_up   each chosen expert's gated product of all tokens, times the share that a token gives it
    down      the sum over chosen experts, in the order of their numbers

Two launches: every block finds out who was chosen, nothing is sorted, and an expert that several tokens chose is read
once.  Bytes: the chosen experts' weights; x, and what lies between, once a block, from L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil, sqrt

from llmc.compiler.kernel import Implementation, Kernel, Launch, Operand, TensorType, short_hash
from llmc.compiler.target import Target
from llmc.schedules.cuda.experts import call as of
from llmc.schedules.cuda.experts.call import ExpertsOp
from llmc.schedules.cuda.linear.call import LinearOp
from llmc.schedules.cuda.linear.gemm_tiles import DEVICES, FLIGHT_BYTES, Device
from llmc.schedules.cuda.linear.gemv_cost import DISORDER
from llmc.schedules.cuda.linear.gemv_params import COLUMN, Gemv, bands, resident_blocks, ring_bytes, shared_bytes
from llmc.schedules.cuda.linear.gemv_weight import weight_format
from llmc.schedules.cuda.norm import c_bool
from llmc.schedules.cuda.source import C_TYPES

MOST_TOKENS = 16
MOST_WARPS, MOST_STAGES = 16, 16
MOST_RING_BYTES = 128 << 10
LEAST_RING_BYTES = 16 << 10
IDLE = 0.3
"""What is lost of the time of warps that have no column in an expert's last step.  An estimate."""


@dataclass(frozen=True)
class Streamed:
    """How both products are cut (linear/gemv_params.py)."""

    gate_up: Gemv
    down: Gemv

    def __str__(self) -> str:
        return f"gate and up: {self.gate_up}; down: {self.down}"


def products(op: ExpertsOp) -> tuple[LinearOp, LinearOp]:
    """Both products of one expert: the first rounds x itself, the second takes it as it comes."""
    up = op.gate_up(op.tokens)
    return replace(up, tiled_x=False), replace(op.down(op.tokens), residual=op.residual)


def space(op: ExpertsOp, target: Target) -> list[Streamed]:
    """Cuts worth measuring, the best on paper first: of each product the best ones beside the other's best."""
    if op.tokens > MOST_TOKENS:
        return []
    device = DEVICES[target.arch]
    up, down = (ways(op, each, device) for each in products(op))
    pairs = [*product(up[:1], down[:4]), *product(up[1:4], down[:1])]
    return [Streamed(*pair) for pair in pairs]


def ways(op: ExpertsOp, each: LinearOp, device: Device) -> list[Gemv]:
    """Cuts of a product, the best on paper first; none where x and a ring do not fit shared memory."""
    columns = ceil(each.k / COLUMN)
    room = device.shared_bytes - chosen_bytes(op)
    bulk = device.wgmma and each.weight != each.element
    found = []
    for warps, side in product(range(1, min(MOST_WARPS, columns) + 1), weight_format(each).sides):
        rings = (
            Gemv(warps, stages, side, device.n_blocks, 0, not each.tiled_x, bulk=bulk)
            for stages in range(MOST_STAGES, 1, -1)
        )
        fits = (r for r in rings if shared_bytes(each, r) <= room and ring_bytes(each, r) <= MOST_RING_BYTES)
        ring = next(fits, None)
        if ring and ring_bytes(each, ring) >= min(LEAST_RING_BYTES, 2 * warps * side * 512):
            found.append(ring)
    return sorted(found, key=lambda ring: (cost_us(op, each, ring, device), -ring.warps, -ring.side))


def chosen_bytes(op: ExpertsOp) -> int:
    """Shared memory in which a block keeps which experts were chosen."""
    words = ceil(op.n_experts / 32) + op.pairs + 1 + op.active * (1 + op.tokens)
    return ceil(4 * words / 1024) * 1024


def cost_us(op: ExpertsOp, each: LinearOp, ring: Gemv, device: Device) -> float:
    """What a product takes on paper: memory, with how evenly blocks share units and warps columns, and what is in
    flight."""
    n_experts = op.expected
    units = bands(each, ring) * (n_experts if each.gated else 1)
    columns = ceil(each.k / COLUMN)
    uneven = ceil(units / ring.blocks) * ring.blocks / units
    idle = 1 + IDLE * (ceil(columns / ring.warps) * ring.warps / columns - 1)
    disorder = DISORDER[ring.side] if each.weight != each.element else 1.0
    shallow = sqrt(max(1.0, FLIGHT_BYTES / ring_bytes(each, ring)))
    memory = n_experts * weight_format(each).n_bytes / device.memory
    return round(memory * uneven * idle * disorder * shallow, 2)


def implement(op: ExpertsOp, params: Streamed, target: Target) -> Implementation:
    """Two launches."""
    device = DEVICES[target.arch]
    up, down = products(op)
    inner = TensorType((op.tokens, op.n), op.element, tiled=True)
    x, index, share = (Operand("input", at) for at in (of.X, of.INDEX, of.SHARE))
    between, y = Operand("temp", 0), Operand("output", 0)
    biases = [[Operand("input", at)] for at in op.bias_inputs] or [[], []]
    added = [*[share] * op.biased, *[Operand("input", op.residual_input)] * op.residual]
    launches = (
        launch(op, up, params.gate_up, (Operand("input", of.GATE_UP), x, index, share, *biases[0], between), device),
        launch(op, down, params.down, (Operand("input", of.DOWN), between, index, *added, *biases[1], y), device),
    )
    return Implementation(launches, (op.active * inner.n_bytes,), layouts=of.layouts(op), family="GEMV")


def launch(op: ExpertsOp, each: LinearOp, ring: Gemv, operands: tuple[Operand, ...], device: Device) -> Launch:
    moved = op.expected * weight_format(each).n_bytes + each.vector_bytes
    between = (op.expected - 1) * op.tokens * op.n * 2
    n_operations = 2 * op.pairs * each.rows * each.k
    kernel = kernel_of(op, each, ring, resident_blocks(each, ring, device))
    return Launch(kernel, operands, ring.blocks, round(moved + between), n_operations)


def kernel_of(op: ExpertsOp, each: LinearOp, ring: Gemv, resident: int) -> Kernel:
    key = f"experts_gemv_source({op!r}, {each!r}, {ring!r}, {resident})"
    digest = short_hash(key)
    name = f"experts_gemv_{each.weight}_{each.words}_{op.chosen}of{op.n_experts}_{digest}"
    build = partial(source, name, op, each, ring, resident)
    return Kernel(name, key, build, 32 * ring.warps, shared_bytes(each, ring), dependent=True)


def source(name: str, op: ExpertsOp, each: LinearOp, ring: Gemv, resident: int) -> str:
    """The kernel's CUDA C++."""
    element = C_TYPES[each.element]
    x, y = (element, "float") if each.tiled_x else ("float", element)
    flags = {"kGated": each.gated, "kJoined": not each.gated, "kTiledX": each.tiled_x, "kSharedX": ring.shared_x}
    flags["kBias"] = each.bias
    flags |= dict.fromkeys(("kMoments", "kDeferred", "kNormBias", "kKept", "kDigits"), False)
    flags |= {"kBulk": ring.bulk, "kResidual": each.residual}
    sizes = f"kWarps = {ring.warps}, kStages = {ring.stages}, kSide = {ring.side}, kDepth = 1, kBlocks = {ring.blocks}"
    others = {"share": each.gated or each.bias, "residual": each.residual}
    arguments = ", ".join(name if there else "nullptr" for name, there in others.items())
    others["bias"] = each.bias
    parameters = "".join(f"const float *{name}, " for name, there in others.items() if there)
    return (
        '#include "experts_gemv.cuh"\n\n'
        "struct Layer {\n"
        f"    using T = {element};\n"
        f"    using Y = {y};\n"
        f"    using Weight = {weight_format(each).c_type};\n"
        f"    static constexpr int kM = {each.m}, kN = {each.n}, kK = {each.k};\n"
        f"    static constexpr int kExperts = {op.n_experts}, kChosen = {op.chosen};\n"
        f"    static constexpr long long kExpertBytes = {of.expert_bytes(each)};\n"
        f"    static constexpr bool {', '.join(f'{flag} = {c_bool(value)}' for flag, value in flags.items())};\n"
        f"    static constexpr Activation kActivation = Activation::{each.activation};\n"
        "    static constexpr Norm kNorm = Norm::none;\n"
        "    static constexpr float kEpsilon = 0.0f;\n"
        f"    static constexpr int {sizes};\n{op.members * each.gated}"
        "};\n\n"
        f'extern "C" __global__ void __launch_bounds__({32 * ring.warps}, {resident})\n'
        f"{name}(const unsigned char *weight, const {x} *x, const long long *index, {parameters}{y} *y) {{\n"
        f"    experts_gemv<Layer>(weight, x, index, {arguments}, y{', bias' * each.bias});\n"
        "}\n"
    )

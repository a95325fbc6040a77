"""What the compiler makes of the kernels that matter, without a GPU: registers, spills, the instructions meant."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, DType, Implementation, Launch, TensorType
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda import compile as cuda
from llmc.schedules.cuda import sample
from llmc.schedules.cuda.linear import rule as linear
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.cuda.linear.gemv_params import Gemv
from tests.schedules.cuda.sass import Sass, missing_tool, read_sass, registers_behind
from tests.schedules.cuda.test_attention import Model
from tests.schedules.cuda.test_deferred_norm import deferred_call, moments_call, stored_as
from tests.schedules.cuda.test_deferred_prompts import appending, in_tiles
from tests.schedules.cuda.test_gemm_append import Layer
from tests.schedules.cuda.test_linear import linear_call, quantised_call
from tests.schedules.cuda.test_low_rank import low_rank_call
from tests.schedules.test_states import of_rows, rule_call

REGISTERS = 65536
"""Of a multiprocessor."""


def unavailable() -> str:
    """Why there is nothing to look at here."""
    try:
        cuda.compiler()
    except LlmcError as error:
        return str(error.fact)
    return missing_tool()


pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "all is here")

LLAMA = Model(heads=32, kv_heads=32, head_dim=128, rotary_dim=128)
APPENDING = Layer(2048, 32, 32, 128, 128, k=4096)
NORMALISING = appending(APPENDING, deferred_call("RMSNormLinear", 2048, 12288, 4096))
LLAMA_INT8 = replace(LLAMA, kv_dtype="int8")
BGE = Model(heads=12, kv_heads=12, rotary_dim=0, rounded=True, both_ways=True)
QWEN3 = replace(LLAMA, kv_heads=8, epsilon=1e-6)


@dataclass(frozen=True)
class Case:
    """A call on an architecture.  wants: instructions that its main kernel has; wide: 16-byte loads are among them;
    from_registers: so do all its products take the weight.  in_digits, keeps_x: by the candidate that treats x so."""

    level: str
    call: Call
    wants: tuple[str, ...]
    wide: bool = True
    from_registers: bool = False
    in_digits: bool = False
    keeps_x: bool = False


def layer(level: str, name: str, m: int, n: int, k: int, *wants: str, wide: bool = True, **options: Any) -> Case:
    return Case(level, linear_call(name, m, n, k, **options), wants, wide)


FP8 = quantised_call(linear_call("RMSNormGatedLinearSilu", 1, 11008, 4096, tiled_y=True), "f8")


def codes(name: str, m: int, n: int, k: int, weight: DType, group: int, *wants: str) -> Case:
    call = linear_call(name, m, n, k, tiled_x=True, tiled_y="Gated" in name)
    wanted = (*wants, "UBLKCP")
    return Case("sm_90a", quantised_call(call, weight, group), wanted, wide=False, from_registers=True)


def adapters(level: str, m: int, *wants: str, **options: Any) -> Case:
    strips = "activation" in options
    call = low_rank_call(m, 4096, (11008, 11008), 64, "bf16", strips=strips, tiled="y" if strips else "x", **options)
    return Case(level, call, wants)


CASES = {
    "qkv of one token": layer("sm_80", "RMSNormLinear", 1, 12288, 4096, "HMMA.16816.F32.BF16"),
    "qkv of one token on Hopper": layer(
        "sm_90a", "Linear", 1, 12288, 4096, "HGMMA.64x16x16.F32.BF16", "UBLKCP", wide=False, tiled_x=True
    ),
    "gate and up of 8 tokens": layer(
        "sm_80", "RMSNormGatedLinearSilu", 8, 11008, 4096, "HMMA.16816.F32.BF16", tiled_y=True
    ),
    "down of 32 tokens": layer(
        "sm_90a", "LinearResidual", 32, 4096, 11008, "HGMMA.64x32x16.F32.BF16", "UBLKCP", tiled_x=True
    ),
    "gate and up of 512 tokens": layer(
        "sm_90a",
        "GatedLinearSilu",
        512,
        11008,
        4096,
        "HGMMA.64x256x16.F32.BF16",
        "UBLKCP",
        "USETMAXREG",
        tiled_x=True,
        tiled_y=True,
    ),
    "fp8 gate and up of one token": Case(
        "sm_90a",
        FP8,
        ("HMMA.16816.F32.BF16", "HMUL2.BF16_V2"),
        wide=False,  # x goes to shared memory, weights by copies
    ),
    "fp8 on Ampere": Case("sm_80", FP8, ("HMMA.16816.F32.BF16", "HFMA2.BF16_V2"), wide=False),
    "down of 16 tokens, in front of a norm": Case(
        "sm_90a", moments_call(16, 4096, 11008), ("HGMMA.64x16x16.F32.BF16", "UBLKCP", "SHFL")
    ),
    "qkv of 64 tokens, behind LayerNorm": Case(
        "sm_90a", deferred_call("LayerNormLinearBias", 64, 12288, 4096), ("HGMMA.64x64x16.F32.BF16", "CCTL"), False
    ),
    "down of 8 tokens, in front of a norm": Case(
        "sm_90a",
        stored_as(moments_call(8, 4096, 11008, columns=16), "i8"),
        ("HMMA.16816.F32.BF16", "UBLKCP", "SHFL", "STAS.128", "UCGABAR_ARV"),
        False,
    ),
    "qkv of 8 tokens, behind LayerNorm": Case(
        "sm_90a",
        stored_as(deferred_call("LayerNormLinearBias", 8, 12288, 4096, columns=16), "i8"),
        ("HMMA.16816.F32.BF16", "UBLKCP", "STAS.128", "LDG.E.64"),
        False,
    ),
    "int4 down of 8 tokens with a bias, in front of a norm": Case(
        "sm_90a",
        stored_as(moments_call(8, 4096, 11008, bias=True, columns=16), "i4"),
        ("HMMA.16816.F32.BF16", "UBLKCP", "STAS.128"),
        False,
    ),
    "int4 output of one token, in front of a norm": Case(
        "sm_90a",
        stored_as(moments_call(1, 4096, 4096, bias=True, columns=16), "i4"),
        ("IMMA.16832.S8.S8", "UBLKCP", "STAS.128"),
        False,
    ),
    "int4 gate and up of one token, in bulk and digits": Case(
        "sm_90a",
        stored_as(deferred_call("RMSNormGatedLinearSilu", 1, 11008, 4096, tiled_y=True, columns=16), "i4"),
        ("IMMA.16832.S8.S8", "UBLKCP", "UBLKPF.L2"),
        False,
        in_digits=True,
    ),
    "int4 down of one token, in digits that are kept": Case(
        "sm_90a",
        stored_as(moments_call(1, 4096, 11008, columns=16), "i4"),
        ("IMMA.16832.S8.S8", "UBLKCP", "STAS.128"),
        False,
        in_digits=True,
        keeps_x=True,
    ),
    "int4 gate and up of 8 tokens, kept in f16": Case(
        "sm_90a",
        stored_as(deferred_call("RMSNormGatedLinearSilu", 8, 11008, 4096, tiled_y=True, columns=16), "i4"),
        ("HMMA.16816.F32", "UBLKCP", "STAS.128"),
        False,
        keeps_x=True,
    ),
    "gate and up of 33 tokens on Ampere, behind RMSNorm": Case(
        "sm_80", deferred_call("RMSNormGatedLinearSilu", 33, 2048, 768, tiled_y=True), ("HMMA.16816.F32",), False
    ),
    "int8 down of 32 tokens": codes("LinearResidual", 32, 4096, 11008, "i8", 0, "HGMMA.64x32x16.F32.BF16"),
    "int4 gate and up of 64 tokens": codes(
        "GatedLinearSilu", 64, 11008, 4096, "i4", 32, "HGMMA.64x64x16.F32.BF16", "HFMA2.BF16_V2"
    ),
    "fp8 gate and up of 1024 tokens": codes("GatedLinearSilu", 1024, 11008, 4096, "f8", 0, "HGMMA.64x256x16.F32.BF16"),
    "qkv of 2048 tokens, turned and appended": Case(
        "sm_90a", APPENDING.appending(), ("HGMMA.64x256x16.F32.BF16", "UBLKCP", "USETMAXREG", "STG.E.128")
    ),
    "qkv of 2048 tokens, normalised, turned and appended": Case(
        "sm_90a", NORMALISING, ("HGMMA.64x256x16.F32.BF16", "UBLKCP", "USETMAXREG", "STG.E.128")
    ),
    "output of 2048 tokens in front of a norm": Case(
        "sm_90a", in_tiles(moments_call(2048, 4096, 4096)), ("HGMMA.64x256x16.F32.BF16", "USETMAXREG", "STG.E.64")
    ),
    "attention of one token": Case("sm_90a", LLAMA.call(1), ("HMMA.16816.F32.BF16",)),
    "attention of 512 tokens": Case("sm_90a", LLAMA.call(512), ("HGMMA", "UBLKCP"), wide=False, from_registers=True),
    "attention of one token over int8": Case("sm_90a", LLAMA_INT8.call(1), ("HMMA.16816.F32", "LDGSTS.E.BYPASS")),
    "attention of one token that normalises": Case(
        "sm_90a", QWEN3.call(1), ("HMMA.16816.F32.BF16", "MUFU.RSQ", "CCTL")
    ),
    "attention of 512 tokens that normalises": Case(
        "sm_90a", QWEN3.call(512), ("HGMMA", "UBLKCP"), wide=False, from_registers=True
    ),
    "attention of texts of 512 tokens": Case(
        "sm_90a", BGE.call(512), ("HGMMA", "UBLKCP"), wide=False, from_registers=True
    ),
    "attention of texts of 1024 tokens, with biases that are looked up": Case(
        "sm_90a", replace(BGE, has_biases=True).call(1024), ("HGMMA", "UBLKCP"), wide=False, from_registers=True
    ),
    "attention of texts of 512 tokens on Ampere": Case("sm_80", BGE.call(512), ("HMMA.16816.F32",), wide=False),
    "attention of 8 tokens over int8 on Ada": Case("sm_89", LLAMA_INT8.call(8), ("HMMA.16816.F32",)),
    "attention of 512 tokens over int8": Case("sm_90a", LLAMA_INT8.call(512), ("HGMMA", "PRMT"), from_registers=True),
    "attention of 512 tokens over int8 on Ampere": Case("sm_80", LLAMA_INT8.call(512), ("HMMA.16816.F32",), wide=False),
    "one token on Ampere": layer("sm_80", "RMSNormLinear", 1, 3072, 768, "HMMA.16816.F32"),
    "128 tokens on Ada": layer("sm_89", "LinearResidual", 128, 768, 3072, "HMMA.16816.F32", "LDGSTS", tiled_x=True),
    "adapters of one token behind RMSNorm": adapters("sm_90a", 1, "CCTL", activation="Silu", norm="RMSNorm"),
    "adapters of 2048 tokens behind RMSNorm": adapters(
        "sm_90a", 2048, "HMMA.16816.F32.BF16", activation="Silu", norm="RMSNorm"
    ),
    "adapters of 2048 tokens on Ampere": adapters("sm_80", 2048, "HMMA.16816.F32.BF16"),
    "128 tokens on Blackwell": layer("sm_100a", "LinearResidual", 128, 768, 3072, "HMMA.16816.F32", tiled_x=True),
}


def compiled(launch: Launch, level: str) -> tuple[Sass, str]:
    """A kernel's machine code, and what the compiler said about it."""
    target = Target("cuda", level)
    source = cuda.kernel_source(launch.kernel, target)
    code, said = cuda.compiler().compile(launch.kernel.name, source, target)
    return read_sass(code), said


def implemented(case: Case) -> Implementation:
    target = Target("cuda", case.level)
    if not (case.in_digits or case.keeps_x):
        return schedules.implement(case.call, target)
    gemvs = (each for each in linear.space(case.call, target) if isinstance(each, Gemv) and each.bulk)
    found = (each for each in gemvs if each.digits == case.in_digits and each.kept == case.keeps_x)
    return linear.implement(case.call, next(found), target)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_keep_to_registers_and_use_the_instructions_meant_for_them(case: Case) -> None:
    launches = implemented(case).launches
    main = max(launches, key=lambda launch: launch.n_operations)
    for launch in launches:
        sass, said = compiled(launch, case.level)
        assert "C75" not in said, "ptxas warns about wgmma"
        assert sass.count("LDL") == sass.count("STL") == 0, "registers are spilled"
        assert sass.registers * launch.kernel.n_threads <= REGISTERS
        if sass.count("USETMAXREG"):  # or warpgroups wait for registers that the block never had
            more, fewer = (int(number, 16) for number in re.findall(r"USETMAXREG\..* (0x[0-9a-f]+)", sass.text))
            assert sass.registers * launch.kernel.n_threads >= 128 * fewer + (launch.kernel.n_threads - 128) * more
            assert 0 < registers_behind(sass, "USETMAXREG.DEALLOC") <= fewer
        if launch is main:
            assert [name for name in case.wants if not sass.count(name)] == []
            assert sass.having("LDG", "128") or not case.wide
            assert sass.products_from_registers == (sass.count("HGMMA") if case.from_registers else 0)


@pytest.mark.parametrize("early", [False, True])
def test_weights_are_asked_for_before_the_wait_and_the_next_kernel_let_in_at_the_end(early: bool) -> None:
    target = Target("cuda", "sm_90a")
    call = linear_call("RMSNormLinear", 1, 4096, 4096)
    params = next(p for p in linear.space(call, target) if isinstance(p, Gemv) and p.early == early)
    sass, _ = compiled(linear.implement(call, params, target).launches[0], target.level)
    wait, last_ask = sass.first("ACQBULK"), len(sass.listed) - sass.listed[::-1].index("LDGSTS.E.BYPASS.LTC128B.128")
    assert sass.first("LDGSTS") < sass.first("UBLKPF") < wait < last_ask
    assert sass.first("PREEXIT") < sass.first("LDGSTS") if early else wait < sass.first("PREEXIT") < last_ask


def test_two_weights_in_fp8_take_the_operations_that_memory_leaves_time_for() -> None:
    """3.5, as include/gemv_quant.cuh counts them; all else that the kernel shifts and masks is counted with them."""
    call = quantised_call(linear_call("Linear", 1, 12288, 4096, tiled_x=True), "f8")
    (launch,) = schedules.implement(call, Target("cuda", "sm_90a")).launches
    sass, _ = compiled(launch, "sm_90a")
    pairs = sass.count("HMUL2.BF16_V2")
    assert pairs >= 64
    assert sass.count("LOP3") + sass.count("SHF") + sass.count("IMAD.SHL") < 4 * pairs


def test_a_draw_adds_in_shared_memory_without_trying_again() -> None:
    logits, draws = TensorType((1, 4096), "f32"), TensorType((1, 32), "u8")
    call = Call(sample.DRAW, (logits, draws), (TensorType((1,), "i32"),))
    sass, _ = compiled(schedules.implement(call, Target("cuda", "sm_90a")).launches[0], "sm_90a")
    assert sass.count("ATOMS.ADD") > 0
    assert sass.count("ATOMS.CAS") == sass.count("ATOMS.CAST") == 0


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_step_of_a_long_prompt_is_one_group_of_products_and_no_fence_of_the_gpu(cluster: int) -> None:
    """Four products a step, committed together; the group before is waited for, and at a tile's end this one."""
    call = linear_call("Linear", 2048, 4096, 4096, tiled_x=True)
    tiling = Tiling(256, 4, 132, shared=False, band=4, cluster=cluster)
    (launch,) = linear.implement(call, tiling, Target("cuda", "sm_90a")).launches
    sass, said = compiled(launch, "sm_90a")
    assert "C75" not in said
    assert sass.count("HGMMA.64x256x16.F32.BF16") == sass.count("HGMMA") == 4
    assert (sass.count("WARPGROUP.ARRIVE"), sass.count("WARPGROUP.DEPBAR")) == (1, 2)
    assert sass.count("UBLKCP.S.G.MULTICAST") == cluster - 1
    assert sass.count("USETMAXREG") == 2
    assert sass.count("MEMBAR.ALL.GPU") == 0
    assert sass.count("LDL") == sass.count("STL") == 0


def test_a_tile_in_turns_that_appends_holds_its_sums_in_registers() -> None:
    """A chunk of 16 bytes is stored for each 8 outputs."""
    tiling = Tiling(128, 6, 132, shared=False, band=8, turns=2, quick=True)
    (launch,) = linear.implement(APPENDING.appending(), tiling, Target("cuda", "sm_90a")).launches
    sass, said = compiled(launch, "sm_90a")
    assert "C75" not in said
    assert sass.count("LDL") == sass.count("STL") == 0
    assert sass.having("STG", "128") == 16
    assert len(sass.listed) < 1800


@pytest.mark.parametrize(("turns", "tokens", "stages", "most"), [(2, 128, 6, 70), (0, 256, 4, 60)])
def test_a_quick_end_has_no_branches_and_a_turn_passes_before_the_last_products_are_done(
    turns: int, tokens: int, stages: int, most: int
) -> None:
    """From one pair of barriers to the next: 16 stores to shared memory, 4 pieces from there, 4 read and 4 written."""
    call = linear_call("LinearResidual", 2048, 4096, 4096, tiled_x=True)
    tiling = Tiling(tokens, stages, 132, shared=False, band=4, turns=turns, quick=True)
    (launch,) = linear.implement(call, tiling, Target("cuda", "sm_90a")).launches
    sass, said = compiled(launch, "sm_90a")
    assert "C75" not in said
    assert sass.count("LDL") == sass.count("STL") == 0
    assert sass.count(f"HGMMA.64x{tokens}x16.F32.BF16") == sass.count("HGMMA") == 4 * max(turns, 1)
    assert (sass.count("WARPGROUP.ARRIVE"), sass.count("WARPGROUP.DEPBAR")) == (1, 2)
    assert (sass.having("LDS", "128"), sass.having("LDG", "128"), sass.having("STG", "128")) == (32, 32, 32)
    stores = [place for place, name in enumerate(sass.listed) if name == "STG.E.128"]
    rounds = sass.listed[stores[0] : stores[-1]]
    assert not [name for name in rounds if name.startswith(("BRA", "BSSY"))]
    assert len(rounds) < 7 * most
    if turns:
        waits = [place for place, name in enumerate(sass.listed) if name.startswith("WARPGROUP.DEPBAR")]
        assert "BAR.ARV" in sass.listed[waits[0] : waits[1]]


@pytest.mark.parametrize(
    ("model", "least"), [(LLAMA, 30), (replace(LLAMA, head_dim=64, rotary_dim=64), 30), (LLAMA_INT8, 16)], ids=str
)
def test_a_page_of_a_long_prompt_is_weighed_while_the_one_before_is_multiplied(model: Model, least: int) -> None:
    """Between the wait for its scores and that for the sums: 32 powers of 2 a thread, and two for the sums."""
    launch = schedules.implement(model.call(2048), Target("cuda", "sm_90a")).launches[1]
    sass, _ = compiled(launch, "sm_90a")
    waits = [place for place, name in enumerate(sass.listed) if name.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 4
    assert sass.listed[waits[1] : waits[2]].count("MUFU.EX2") >= least
    assert waits[2] - waits[1] < 320
    assert sass.count("HGMMA") == 2 * (model.head_dim // 16 + 4)


@pytest.mark.parametrize(
    ("weight", "group", "most"),
    [("i8", 0, 115), ("f8", 0, 115), ("i4", 32, 160), ("i4", 128, 150), ("z4", 32, 190), ("z4", 128, 165)],
)
def test_a_step_of_codes_takes_the_instructions_that_are_counted_on(weight: DType, group: int, most: int) -> None:
    """As include/gemm_codes.cuh and gemm_zeros.cuh count them: from a step's wait to its last product."""
    call = quantised_call(linear_call("LinearResidual", 32, 4096, 11008, tiled_x=True), weight, group)
    (launch,) = schedules.implement(call, Target("cuda", "sm_90a")).launches
    sass, _ = compiled(launch, "sm_90a")
    products = [place for place, name in enumerate(sass.listed) if name.startswith("HGMMA")]
    wait = max(place for place in range(products[0]) if sass.listed[place].startswith("SYNCS.PHASECHK"))
    assert len(products) == 4
    assert products[-1] - wait < most


@pytest.mark.parametrize("rows", [1, 2048])
def test_a_state_is_asked_for_before_the_kernel_in_front_has_ended(rows: int) -> None:
    """In 16 bytes, four for each lane, and no register more than three blocks of a prompt find room for."""
    (launch,) = schedules.implement(of_rows(rule_call(16, 32, 128, 128), rows), Target("cuda", "sm_90a")).launches
    sass, _ = compiled(launch, "sm_90a")
    loads = [place for place, name in enumerate(sass.listed) if name.startswith("LDG.E.128")]
    assert len(loads) == 4
    assert loads[-1] < sass.first("ACQBULK")
    assert sass.registers * launch.kernel.n_threads * 3 <= REGISTERS


def test_a_spill_is_seen() -> None:
    """The gate itself: too many live values for the registers allowed."""
    source = """
        extern "C" __global__ void __launch_bounds__(1024, 2) spilling(const float *x, float *y) {
            float v[64];
            for (int i = 0; i < 64; i++) v[i] = x[threadIdx.x + 1024 * i];
            for (int k = 0; k < 9; k++)
                for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i * 7 + 3) % 64] + v[(i * 5 + 1) % 64];
            for (int i = 0; i < 64; i++) y[threadIdx.x + 1024 * i] = v[i];
        }
    """
    code, said = cuda.compiler().compile("spilling", source, Target("cuda", "sm_90a"))
    sass = read_sass(code)
    assert sass.count("LDL")
    assert sass.count("STL")
    assert "bytes spill stores" in said

"""Products in tile registers: what test_linear.py asks of every level, at the edges of tiles, blocks and chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import DType
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.compiler.target import Target
from llmc.schedules.cpu.linear import amx_quant_rule as amx_quant
from llmc.schedules.cpu.linear import amx_rule as amx_linear
from llmc.schedules.execute import Executable
from tests.schedules.conftest import LEVELS_HERE
from tests.schedules.test_linear import linear_call, product, random_inputs
from tests.schedules.test_linear_fp8 import FP8
from tests.schedules.test_linear_int8_int4 import SCHEMES, quant_call
from tests.schedules.test_linear_int8_int4 import random_inputs as quant_inputs

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

AMX = Target("cpu", "x86-64-v4+amx")
SHAPES = [
    (1, 16, 1),
    (15, 17, 31),
    (16, 100, 32),
    (17, 48, 33),
    (31, 32, 65),
    (32, 33, 96),
    (33, 64, 34),
    (65, 40, 1100),
]

needs_amx = pytest.mark.skipif(AMX.level not in LEVELS_HERE, reason="needs a CPU with AMX")


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_edge_of_a_tile_is_right(run: Run, shape: tuple[int, int, int]) -> None:
    call = linear_call("Linear", *shape, "bf16")
    x, weight = random_inputs(call)
    (y,) = run(call, x, weight, target=AMX, n_tasks=3)
    np.testing.assert_allclose(y, product(x, weight), atol=3e-6)


@needs_amx
@pytest.mark.parametrize(("op", "dtype"), [("LinearBias", "bf16"), ("GatedLinearSilu", "bf16"), ("Linear", "f8")])
def test_blocks_and_neighbours_change_no_bit(op: str, dtype: DType) -> None:
    rows, weight, *bias = random_inputs(linear_call(op, 70, 128, 1130))
    stored: Any = quantize(weight, FP8) if dtype == "f8" else weight
    seen: dict[int, bytes] = {}
    for m in (1, 16, 17, 70):
        call = linear_call(op, m, 128, 1130, dtype)
        space = list(amx_linear.space(call, AMX))
        for tiles in space[:: max(1, len(space) // 3)]:
            executable = Executable(call, amx_linear.implement(call, tiles, AMX), AMX)
            (y,) = executable.run(rows[70 - m :], stored, *bias, n_tasks=2)
            for row in range(m):
                assert seen.setdefault(70 - m + row, y[row].tobytes()) == y[row].tobytes(), (m, tiles, row)


@needs_amx
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("op", "m", "n", "k"), [("LinearBias", 33, 40, 200), ("GatedLinearSilu", 70, 64, 384)])
def test_bytes_have_the_bits_of_other_levels(run: Run, op: str, m: int, n: int, k: int, scheme: Scheme) -> None:
    call = quant_call(op, m, n, k, scheme)
    x, weight, rest = quant_inputs(call)
    x[3], x[4, ::7] = 0, 1e4
    (expected,) = run(call, x, weight, *rest, target=Target("cpu", "x86-64-v4+bf16"))
    inputs: list[Any] = [x, weight, *rest]
    space = list(amx_quant.space(call, AMX))
    assert schedules.implement(call, AMX).rule == "linear_bytes_amx"
    for tiles in space[:: len(space) // 2]:
        (y,) = Executable(call, amx_quant.implement(call, tiles, AMX), AMX).run(*inputs, n_tasks=2)
        np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("m", [1, 16, 17, 32, 33, 100, 512])
def test_every_block_fits_the_registers(m: int) -> None:
    call = linear_call("Linear", m, 256, 2048, "bf16")
    space = list(amx_linear.space(call, AMX))
    assert len(space) > 5
    for tiles in space:
        block = amx_linear.tile_block(tiles)
        assert block.rows <= 16
        assert len(block.weights) >= 1
        assert block.rows * block.across == tiles.rows


def test_only_what_becomes_bf16_on_a_level_that_has_it_is_multiplied_in_tiles() -> None:
    call = linear_call("Linear", 4, 64, 64, "bf16")
    assert schedules.implement(call, AMX).rule == "linear_amx"
    assert schedules.implement(call, Target("cpu", "x86-64-v4+bf16")).rule == "linear"
    assert schedules.implement(linear_call("Linear", 4, 64, 64, "f8"), AMX).rule == "linear_amx"
    assert schedules.implement(linear_call("Linear", 4, 64, 64, "f32"), AMX).rule == "linear"


def test_few_rows_of_bytes_are_multiplied_in_vectors() -> None:
    rules = [schedules.implement(quant_call("Linear", m, 64, 256, SCHEMES[0]), AMX).rule for m in (1, 8, 9, 128)]
    assert rules == ["linear_int8", "linear_int8", "linear_bytes_amx", "linear_bytes_amx"]


def test_a_weight_lies_as_on_other_levels() -> None:
    call = linear_call("GatedLinearSiluBias", 4, 64, 63, "bf16")
    others = schedules.implement(call, Target("cpu", "x86-64-v4+bf16"))
    assert schedules.implement(call, AMX).layouts == others.layouts

"""Attention in tile registers: what test_attention.py asks of every level, at the edges of tiles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.kernel import PAGE_TOKENS
from llmc.compiler.target import Target
from llmc.schedules import lower
from llmc.schedules.cpu.amx import ROWS
from llmc.schedules.cpu.attention import rule as attention
from llmc.schedules.execute import Executable
from tests.schedules.test_amx import AMX, needs_amx
from tests.schedules.test_attention import Machine, Model, Row, check_one_sequence
from tests.schedules.test_attention_sizes import SIZES

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]

BF16 = Target("cpu", "x86-64-v4+bf16")
UNEVEN = Model(heads=19, kv_heads=1, head_dim=96, rotary_dim=32, softcap=20.0, window=70, kv_dtype="bf16")
"""Its query rows fill no tiles, neither those of one row nor those of a block."""


def sizes(model: Model, m: int, target: Target) -> Any:
    return attention.parse(model.call(m), target)


@needs_amx
def test_rows_that_fill_no_tile_are_right_in_every_step(run: Run) -> None:
    a = sizes(UNEVEN, 40, AMX)
    assert a.rows_beyond(1)
    assert a.room(6) > 6 * a.group
    check_one_sequence(Machine(UNEVEN, run, AMX, (131,)))


@needs_amx
@pytest.mark.parametrize("kind", ["values of fewer elements", "long heads", "all of them"])
def test_layers_of_any_size_are_right_in_every_step(run: Run, kind: str) -> None:
    model = replace(SIZES[kind], kv_dtype="bf16")
    assert sizes(model, 40, AMX).dot == "tiles"
    check_one_sequence(Machine(model, run, AMX, (131,)))


@needs_amx
def test_sums_too_small_for_float32_have_the_same_bits_in_every_step(run: Run) -> None:
    machine = Machine(UNEVEN, run, AMX, (131,))
    machine.sequences[0].qkv[:, -UNEVEN.head_dim :] *= np.float32(1e-38)
    whole = machine.prefill(0, 40)
    assert (np.abs(whole[whole != 0]) < np.finfo(np.float32).tiny).any()
    machine.forget()
    for position in range(131):
        np.testing.assert_array_equal(machine.step([(0, position)])[0], whole[position])


@needs_amx
def test_every_choice_of_blocks_gives_the_same_bits(run: Run) -> None:
    machine = Machine(UNEVEN, run, AMX, (131,))
    whole, call = machine.prefill(0, 40), UNEVEN.call(40)
    rows: list[Row] = [*((0, 90 + i) for i in range(39)), None]
    cache = np.zeros((1, 1, PAGE_TOKENS, UNEVEN.head_dim), np.float32)
    for blocks in (attention.Blocks(1), attention.Blocks(16)):
        assert blocks in list(attention.space(call, AMX))
        kernel = Executable(call, attention.implement(call, blocks, AMX), AMX)
        out, *_ = kernel.run(*machine.inputs(rows), cache, cache, n_tasks=3, kv=machine.pool[machine.layer :])
        np.testing.assert_array_equal(out[:39], whole[90:129])
        assert not out[39].any()


@needs_amx
def test_a_page_is_written_as_on_other_levels(run: Run) -> None:
    machine, other = (Machine(UNEVEN, run, target, (131,)) for target in (AMX, BF16))
    expected = other.prefill(0, 40)
    assert np.abs(machine.prefill(0, 40) - expected).max() <= 2e-3 * np.abs(expected).max()
    np.testing.assert_array_equal(machine.pool, other.pool)


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_both_products_are_of_tiles_and_a_task_leaves_no_tiles_behind(tmp_path: Path) -> None:
    path = tmp_path / "attend.o"
    attend = attention.implement(Model(kv_dtype="bf16").call(1), attention.Blocks(1), AMX).launches[1].kernel
    path.write_bytes(lower.compile_kernel(attend, AMX))
    text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert text.count("ldtilecfg") == text.count("tilerelease") == 1
    assert "tdpbf16ps" in text
    assert "vdpbf16ps" not in text


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype", "target", "dot"),
    [
        (64, "bf16", AMX, "tiles"),
        (80, "bf16", AMX, "tiles"),
        (24, "bf16", AMX, "dpbf16"),
        (64, "f32", AMX, "fma"),
        (64, "int8", AMX, "madd16"),
        (64, "bf16", BF16, "dpbf16"),
        (64, "bf16", Target("cpu", "x86-64-v4"), "widen"),
    ],
)
def test_a_bf16_cache_is_multiplied_in_tiles_where_head_dims_fill_them(
    head_dim: int, kv_dtype: str, target: Target, dot: str
) -> None:
    assert sizes(Model(head_dim=head_dim, kv_dtype=kv_dtype), 4, target).dot == dot


@pytest.mark.parametrize("heads", [1, 3, 7, 8, 16, 17, 19, 32, 71])
def test_tiles_cover_the_query_rows_of_every_block(heads: int) -> None:
    for m in (1, 8, 40, 512):
        a = sizes(replace(UNEVEN, heads=heads), m, AMX)
        for blocks in attention.space(UNEVEN.call(m), AMX):
            rows = blocks.rows * heads
            assert a.tile_rows(blocks.rows) <= ROWS
            assert rows <= a.room(blocks.rows) < rows + ROWS
            assert a.room(blocks.rows) % a.tile_rows(blocks.rows) == 0

"""What a kit fills artifacts with, and what it makes of a trace; no GPU, no kit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.bench.gpu import bits
from llmc.bench.gpu.fill import packed_codes
from llmc.bench.gpu.kit import layout_to_json
from llmc.bench.gpu.trace import last, summed
from llmc.schedules.cuda.quant_strips import Fp8Strips, Int4Strips, Int8Strips


def test_codes_of_fp8_stand_for_what_the_format_says() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(bits.e4m3(), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    values = np.random.default_rng(0).normal(0, 100, 1000).clip(-448, 448).astype(np.float32)
    nearest = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = bits.e4m3()[bits.e4m3_of(values).view(np.uint8)]
    np.testing.assert_array_equal(np.abs(ours - values), np.abs(nearest - values))


@pytest.mark.parametrize("layout", [Int8Strips(), Fp8Strips(True), Int4Strips(32), Int4Strips(128, True)], ids=str)
def test_made_up_codes_fill_their_place(layout: Any) -> None:
    shape = (384, 256)
    data = packed_codes(layout_to_json(layout), shape, layout.n_bytes(shape))
    assert data.nbytes == layout.n_bytes(shape)
    assert data.any()


def test_a_trace_says_what_kernels_take_in_their_places() -> None:
    """b begins while a still runs: what it takes is from a's end on."""
    spans = [(0.0, 4.0, "a_0123abcd"), (3.0, 9.0, "b"), (9.5, 12.0, "a_4567cdef"), (11.0, 18.0, "b")]
    assert summed(spans) == [
        {"name": "b", "n": 2, "us": 6.5, "advance_us": 5.5},
        {"name": "a", "n": 1, "us": 2.5, "advance_us": 3.0},
    ]
    assert last(spans[1:]) == [("b", 0.0, 6.0), ("a", 6.5, 9.0), ("b", 8.0, 15.0)]

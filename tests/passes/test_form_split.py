"""passes/form_split.py"""

from typing import Any

import pytest

from llmc.passes.form_split import form_split


def sliced(build: Any, x: Any, start: int, stop: int) -> Any:
    axis = len(x.shape) - 1
    return build.op("Slice", x, *(build.constant([number]) for number in (start, stop, axis, 1)))


def test_slices_that_cover_a_value_are_a_split(build: Any, check: Any) -> None:
    x = build.input("x", "batch", "sequence", 8)
    last, first, middle = sliced(build, x, 6, 1 << 62), sliced(build, x, 0, 4), sliced(build, x, 4, 6)
    check(build.model(build.op("Concat", last, first, middle, axis=2)), form_split, 1)


@pytest.mark.parametrize("stop", [3, 5])
def test_slices_that_overlap_or_leave_a_gap_stay(build: Any, refused: Any, stop: int) -> None:
    x = build.input("x", "batch", "sequence", 8)
    refused(build.model(build.op("Concat", sliced(build, x, 0, stop), sliced(build, x, 4, 8), axis=2)), form_split)


def test_halves_of_heads_stay(build: Any, refused: Any) -> None:
    x = build.input("x", "batch", 2, "sequence", 8)
    refused(build.model(build.op("Concat", sliced(build, x, 4, 8), sliced(build, x, 0, 4), axis=3)), form_split)

"""passes/drop_slice.py"""

from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.drop_slice import drop_slice

END = 2**63 - 1


def joined(build: Any, start: int, stop: int, axis: int = 2) -> Any:
    parts = (build.input(name, "M", 2, size) for name, size in (("a", 4), ("b", 3), ("c", 5)))
    bounds = (build.constant([number]) for number in (start, stop, axis))
    return build.model(build.op("Neg", build.op("Slice", build.op("Concat", *parts, axis=-1), *bounds)))


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 7), (7, END)])
def test_a_piece_is_taken_from_where_it_was_before(build: Any, check: Any, start: int, stop: int) -> None:
    check(joined(build, start, stop), drop_slice, 1)


@pytest.mark.parametrize(("start", "stop", "axis"), [(0, 3, 2), (4, END, 2), (0, 1, 1)])
def test_more_or_less_than_a_piece_is_refused(build: Any, refused: Any, start: int, stop: int, axis: int) -> None:
    refused(joined(build, start, stop, axis), drop_slice)

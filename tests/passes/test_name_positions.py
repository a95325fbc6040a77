"""passes/name_positions.py"""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.name_positions import name_positions
from llmc.runtime.errors import LlmcError

run = partial(name_positions, n_context=64)
run.__name__ = "name_positions"  # type: ignore[attr-defined]


def counted(build: Any, ids: Any) -> Any:
    """0, 1, 2, … [sequence]"""
    zero, one = (build.constant(ir.tensor(np.array(number, np.int64))) for number in (0, 1))
    sequence = build.op("Squeeze", build.op("Shape", ids, start=1, end=2))
    return build.op("Range", zero, sequence, one, shape=("sequence",))


def embedded(build: Any, ids: Any) -> Any:
    return build.op("Gather", build.weight("w", 11, 4), ids)


def test_a_range_is_the_positions(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    at = build.op("Cast", build.op("Unsqueeze", counted(build, ids), build.constant([0, 2])), to=1)
    angles = build.op("Cos", build.op("Mul", at, build.weight("inv_freq", 4)))
    check(build.model(build.op("Add", embedded(build, ids), angles)), run, 2)


def test_a_sum_over_a_mask_is_positions_and_a_constant(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    ones = build.op("Expand", build.constant([1]), build.op("Shape", ids), shape=("batch", "sequence"))
    last = build.constant(ir.tensor(np.array(1, np.int64)))
    at = build.op("Add", build.op("CumSum", ones, last, shape=("batch", "sequence")), build.constant([1]))
    check(
        build.model(build.op("Add", embedded(build, ids), build.op("Gather", build.weight("p", 12, 4), at))),
        run,
        2,
    )


def test_a_table_read_for_one_sequence_is_read_for_each(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    table = build.op("Gather", build.weight("p", 12, 4), counted(build, ids))
    check(build.model(build.op("Add", embedded(build, ids), table)), run, 1)


def test_what_positions_alone_are_made_into_may_take_sizes(build: Any, refused: Any) -> None:
    ids, positions = build.sequence_inputs()
    times = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant([1, 1]), axis=0)
    tables = build.op("Tile", build.weight("angles", 1, 16, 4), times, shape=("batch", 16, 4))
    at = build.op("Expand", build.op("Unsqueeze", positions, build.constant([2])), build.constant([1, 1, 4]))
    angles = build.op("GatherElements", tables, at, axis=1, shape=("batch", "sequence", 4))
    refused(build.model(build.op("Add", embedded(build, ids), angles)), run)


def test_positions_that_do_not_go_on_counting_are_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    last = build.constant(ir.tensor(np.array(40, np.int64)))
    at = build.op("Unsqueeze", build.op("Min", counted(build, ids), last), build.constant([0, 2]))
    angles = build.op("Cos", build.op("Mul", build.op("Cast", at, to=1), build.weight("inv_freq", 4)))
    with pytest.raises(LlmcError, match="how long the sequence is"):
        run(build.model(build.op("Add", embedded(build, ids), angles)))


def test_another_use_of_the_length_is_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    length = build.op("Cast", build.op("Shape", ids, start=1, end=2), to=1)
    with pytest.raises(LlmcError, match="how long the sequence is"):
        run(build.model(build.op("Div", embedded(build, ids), length)))

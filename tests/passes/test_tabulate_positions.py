"""passes/tabulate_positions.py"""

from functools import partial, update_wrapper
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.tabulate_positions import tabulate_positions
from llmc.runtime.errors import LlmcError

tabulate = update_wrapper(partial(tabulate_positions, n_context=16), tabulate_positions)


def sinusoids(build: Any, positions: Any) -> Any:
    column = build.op("Unsqueeze", positions, build.constant([2]))
    numbers = build.op("Cast", column, to=ir.DataType.FLOAT)
    numbers.dtype = ir.DataType.FLOAT
    return build.op("Cos", build.op("Mul", numbers, build.weight("inv_freq", 4)))


def test_angles_become_a_table(build: Any, check: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    check(build.model(build.op("Mul", x, sinusoids(build, positions))), tabulate, 1)


def test_learned_positions_become_the_rows_in_reach(build: Any, check: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    learned = build.op("Gather", build.weight("learned", 20, 4), build.op("Add", positions, build.constant([2])))
    check(build.model(build.op("Add", x, learned)), tabulate, 1)


def test_table_keeps_what_meets_the_heads_outside(build: Any, check: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 2, 4), ids)
    heads = build.op("Transpose", x, perm=[0, 2, 1, 3])
    cos = build.op("Unsqueeze", sinusoids(build, positions), build.constant([1]))
    check(build.model(build.op("Mul", heads, cos)), tabulate, 1)


def test_a_table_that_is_repeated_for_each_sequence_is_one(build: Any, check: Any) -> None:
    """As GPT-J looks its angles up: torch.gather of a table, as many times as there are sequences."""
    ids, positions = build.sequence_inputs()
    times = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant([1, 1]), axis=0)
    tables = build.op("Tile", build.weight("angles", 1, 16, 4), times, shape=("batch", 16, 4))
    at = build.op("Expand", build.op("Unsqueeze", positions, build.constant([2])), build.constant([1, 1, 4]))
    angles = build.op("GatherElements", tables, at, axis=1, shape=("batch", "sequence", 4))
    check(build.model(build.op("Mul", build.op("Gather", build.weight("embed", 11, 4), ids), angles)), tabulate, 1)


def scaled(build: Any, *, by_length: bool) -> ir.Model:
    """Queries that grow by their place, as Llama 4 counts it; or by how far it is from the last."""
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    length = build.op("Squeeze", build.op("Shape", ids, start=1, end=2))
    zero, one = (build.constant(ir.tensor(np.array(number, np.int64))) for number in (0, 1))
    places = build.op("Range", zero, length, one, shape=("sequence",))
    places = build.op("Sub", length, places) if by_length else build.op("Add", places, one)
    column = build.op("Unsqueeze", build.op("Log", build.op("Cast", places, to=1)), build.constant([0, 2]))
    times = build.op("Expand", column, build.op("Concat", build.op("Shape", ids), build.constant([1]), axis=0),
                     shape=("batch", "sequence", 1))  # fmt: skip
    model: ir.Model = build.model(build.op("Mul", x, times))
    return model


def test_what_is_counted_becomes_a_table(build: Any, check: Any) -> None:
    check(scaled(build, by_length=False), tabulate, 1)


def test_what_is_counted_from_the_end_is_refused_when_its_table_is_read(build: Any) -> None:
    model = scaled(build, by_length=True)
    assert tabulate(model) == 1
    with pytest.raises(LlmcError, match="positions of several tokens"):
        model.graph.initializers["table.expand"].const_value.numpy()  # type: ignore[union-attr]


def test_a_lookup_by_position_is_a_table_already(build: Any, refused: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    refused(build.model(build.op("Add", x, build.op("Gather", build.weight("learned", 20, 4), positions))), tabulate)


def test_too_few_learned_positions_are_refused(build: Any) -> None:
    _, positions = build.sequence_inputs()
    learned = build.op("Gather", build.weight("learned", 17, 4), build.op("Add", positions, build.constant([2])))
    with pytest.raises(LlmcError, match="fewer than 16 tokens"):
        tabulate(build.model(learned))


@pytest.mark.parametrize("reduce", ["ReduceMean", "ReduceMax", "ReduceMin"])
def test_a_value_that_mixes_positions_is_refused_when_its_table_is_read(build: Any, reduce: str) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    if reduce == "ReduceMean":
        cos = sinusoids(build, positions)
        mixed = build.op("Sub", cos, build.op(reduce, cos, build.constant([1]), keepdims=1))
    else:  # places that depend on how long the text is
        one = build.op(reduce, positions, build.constant([1]), keepdims=1)
        mixed = sinusoids(build, build.op("Sub", positions, one))
    model = build.model(build.op("Mul", x, mixed))
    assert tabulate(model) == 1
    (table,) = (v.const_value for name, v in model.graph.initializers.items() if name.startswith("table"))
    with pytest.raises(LlmcError, match="positions of several tokens"):
        table.numpy()


def read_table(model: ir.Model) -> None:
    tabulate(model)
    (table,) = (v.const_value for name, v in model.graph.initializers.items() if name.startswith("table"))
    assert table is not None
    table.numpy()


def test_of_positions_that_change_in_long_texts_is_said_how_long_they_do_not(build: Any) -> None:
    """As LongRoPE does; here in texts of more than 12 tokens."""
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    last = build.op("ReduceMax", positions, build.constant([1]), keepdims=1)
    is_long = build.op("Cast", build.op("Greater", last, build.constant([11])), to=7)
    model = build.model(build.op("Mul", x, sinusoids(build, build.op("Add", positions, is_long))))
    with pytest.raises(LlmcError, match="positions of several tokens") as said:
        read_table(model)
    assert said.value.hint == "up to 12 tokens it does not: --max-seq 12"


def test_positions_that_give_no_numbers_are_refused(build: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    less = build.op("Sub", sinusoids(build, positions), build.constant(ir.tensor(np.float32(9))))
    model = build.model(build.op("Mul", x, build.op("Log", less)))
    with pytest.raises(LlmcError, match="not a number"):
        read_table(model)


def test_learned_table_keeps_the_stored_dtype(build: Any) -> None:
    ids, positions = build.sequence_inputs()
    x = build.op("Gather", build.weight("embed", 11, 4), ids)
    source = build.weight("learned", 20, 4)
    source.const_value.stored_dtype = "bf16"
    model = build.model(build.op("Add", x, build.op("Gather", source, build.op("Add", positions, build.constant([2])))))
    tabulate(model)
    table = model.graph.initializers["learned[positions]"].const_value
    assert table.stored_dtype == "bf16"
    assert np.array_equal(table.stored(), source.const_value.stored()[2:18])
    assert graph.count_ops(model) == {"Gather": 2, "Add": 1}


def test_too_few_positions_looked_up_directly_are_refused(build: Any) -> None:
    _, positions = build.sequence_inputs()
    with pytest.raises(LlmcError, match="fewer than 16 tokens"):
        tabulate(build.model(build.op("Gather", build.weight("learned", 15, 4), positions)))


def test_learned_positions_counted_from_the_end_are_refused(build: Any) -> None:
    """The table would be right for 16 tokens only."""
    ids, positions = build.sequence_inputs()
    n_tokens = build.op("Shape", ids, start=1, end=2)
    n_tokens.dtype = ir.DataType.INT64
    at = build.op("Sub", build.op("Sub", n_tokens, build.constant([1])), positions)
    model = build.model(build.op("Gather", build.weight("learned", 16, 4), at))
    with pytest.raises(LlmcError, match="positions of several tokens"):
        tabulate(model)

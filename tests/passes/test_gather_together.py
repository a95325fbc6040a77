"""passes/gather_together.py"""

from typing import Any

import numpy as np
import onnx_ir as ir

from llmc.compiler import graph
from llmc.compiler.weights import Weight
from llmc.passes.gather_together import gather_together


def looked_up(build: Any, name: str, index: Any, columns: int = 8) -> Any:
    return build.op("Gather", build.weight(name, 11, columns), index, axis=0)


def test_lookups_of_a_step_become_one(build: Any, check: Any) -> None:
    """By tokens, and by positions."""
    tokens, positions = build.token_inputs()
    x = build.op("Relu", looked_up(build, "embedding", tokens))
    total = build.op("Add", x, looked_up(build, "table", positions))
    cos = looked_up(build, "cos", positions, 4)
    check(build.model(build.op("Concat", total, cos, axis=1)), gather_together, 3)


def test_more_than_one_launch_has_room_for_become_two(build: Any) -> None:
    tokens, positions = build.token_inputs()
    rows = [looked_up(build, f"table{i}", positions if i % 2 else tokens) for i in range(11)]
    model = build.model(build.op("Concat", *rows, axis=1))
    feeds = {"tokens": np.arange(6), "positions": np.arange(6)[::-1].copy()}
    wanted = graph.evaluate(model, feeds)["logits"]
    assert gather_together(model) == 11
    assert graph.count_ops(model) == {"llmc.Gather8": 1, "llmc.Gather3": 1, "Concat": 1}
    np.testing.assert_array_equal(graph.evaluate(model, feeds)["logits"], wanted)
    assert gather_together(model) == 0


def test_one_lookup_is_left(build: Any, refused: Any) -> None:
    refused(build.model(build.op("Relu", looked_up(build, "table", build.token_inputs()[0]))), gather_together)


def test_rows_of_a_value_are_left(build: Any, refused: Any) -> None:
    tokens, _ = build.token_inputs()
    x = build.op("Gather", build.op("Relu", build.input("h", 11, 8)), tokens, axis=0)
    refused(build.model(build.op("Add", looked_up(build, "table", tokens), x)), gather_together)


def test_rows_by_numbers_that_are_worked_out_are_left(build: Any, refused: Any) -> None:
    tokens, positions = build.token_inputs()
    x = looked_up(build, "table", build.op("Abs", positions))
    refused(build.model(build.op("Add", looked_up(build, "other", tokens), x)), gather_together)


def test_columns_are_left(build: Any, refused: Any) -> None:
    tokens, _ = build.token_inputs()
    columns = build.op("Gather", build.weight("table", 8, 11), tokens, axis=1)
    turned = build.op("Transpose", columns, perm=[1, 0])
    refused(build.model(build.op("Add", looked_up(build, "other", tokens), turned)), gather_together)


def test_rows_that_products_round_are_left(build: Any, refused: Any) -> None:
    """They are written as tiles."""
    tokens, positions = build.token_inputs()
    weight = build.constant(Weight.of_array("W", np.ones((8, 8), np.float32)).stored_as("bf16"), "W")
    product = build.op("llmc.Linear", looked_up(build, "embedding", tokens), weight)
    refused(build.model(build.op("Add", product, looked_up(build, "table", positions))), gather_together)


def test_whole_numbers_are_left(build: Any, refused: Any) -> None:
    """What a token's expert is, say."""
    tokens, positions = build.token_inputs()
    table = build.constant(ir.tensor(np.arange(11)), "experts")
    chosen = build.op("Cast", build.op("Gather", table, tokens, axis=0), to=int(ir.DataType.FLOAT))
    refused(
        build.model(
            build.op("Mul", build.op("Unsqueeze", chosen, build.constant([1])), looked_up(build, "table", positions))
        ),
        gather_together,
    )

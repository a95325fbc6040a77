"""passes/share_table.py"""

from typing import Any

import pytest

from llmc.compiler import graph
from llmc.compiler.quantization.quantize import Scheme
from llmc.passes.quantize_weights import quantize_weights
from llmc.passes.share_table import share_table


def tied(build: Any, columns: int = 8, op: str = "llmc.Linear") -> Any:
    """A model whose embedding makes the logits."""
    tokens, _ = build.token_inputs()
    table = build.weight("embedding", 12, columns)
    x = build.op("llmc.LinearRelu", build.op("Gather", table, tokens, axis=0), build.weight("body", columns, columns))
    return build.model(build.op(op, x, table))


def test_a_table_that_makes_the_logits_too_lies_as_these_want_it(build: Any, check: Any) -> None:
    check(tied(build), share_table, 1)


def test_a_table_in_int8_is_looked_up_in_its_codes(build: Any, check: Any) -> None:
    model = tied(build)
    assert quantize_weights(model, Scheme(8, lm_head=True)) == 2
    check(model, share_table, 1, tolerance=0.02)  # what is looked up is rounded too
    assert {str(value.name) for value in model.graph.initializers.values()} == {"embedding.int8", "body.int8"}


@pytest.mark.parametrize("scheme", [Scheme(4, 32, lm_head=True), Scheme(8, number="fp", lm_head=True)], ids=str)
def test_coarser_codes_leave_the_embedding_as_it_is(build: Any, refused: Any, scheme: Scheme) -> None:
    model = tied(build, columns=32)
    assert quantize_weights(model, scheme) == 2
    refused(model, share_table)


def test_a_table_of_its_own_is_left(build: Any, refused: Any) -> None:
    tokens, _ = build.token_inputs()
    x = build.op("Gather", build.weight("embedding", 12, 8), tokens, axis=0)
    refused(build.model(build.op("llmc.Linear", x, build.weight("head", 12, 8))), share_table)


def test_columns_are_left(build: Any, refused: Any) -> None:
    tokens, _ = build.token_inputs()
    table = build.weight("embedding", 8, 8)
    x = build.op("Transpose", build.op("Gather", table, tokens, axis=1), perm=[1, 0])
    refused(build.model(build.op("llmc.Linear", x, table)), share_table)


def test_a_gated_table_is_left(build: Any, refused: Any) -> None:
    refused(tied(build, op="llmc.GatedLinearSilu"), share_table)


def test_rows_of_an_odd_number_of_elements_in_bf16_are_left(build: Any, refused: Any) -> None:
    model = tied(build, columns=7)
    value = model.graph.initializers["embedding"]
    weight = graph.weight_of(value)
    assert weight is not None
    value.const_value = weight.stored_as("bf16")
    refused(model, share_table)

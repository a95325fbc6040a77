"""passes/quantize_table.py"""

from typing import Any

import numpy as np
import pytest

from llmc.compiler.weights import Coded, Weight
from llmc.passes.quantize_table import quantize_table

SIX_BITS = Coded(6, 16)


def looked_up(build: Any, coded: Coded | None = SIX_BITS, columns: int = 8, axis: int = 0) -> Any:
    """Rows of a table that a checkpoint keeps so."""
    tokens, _ = build.token_inputs()
    values = np.random.default_rng(0).standard_normal((12, columns)).astype(np.float32)
    table = build.constant(Weight("embedding", values.shape, lambda: values, "bf16", coded), "embedding")
    return build.op("Gather", table, tokens, axis=axis), table


def test_an_embedding_that_is_codes_becomes_int8(build: Any, check: Any) -> None:
    x, _ = looked_up(build)
    check(build.model(build.op("llmc.Linear", x, build.weight("head", 12, 8))), quantize_table, 1, tolerance=0.02)


@pytest.mark.parametrize("wrong", [{"coded": None}, {"columns": 6}, {"axis": 1}], ids=str)
def test_other_tables_are_left(build: Any, refused: Any, wrong: dict[str, Any]) -> None:
    refused(build.model(build.op("Relu", looked_up(build, **wrong)[0])), quantize_table)


def test_a_table_that_makes_the_logits_is_left_to_these(build: Any, refused: Any) -> None:
    x, table = looked_up(build)
    refused(build.model(build.op("llmc.Linear", x, table)), quantize_table)

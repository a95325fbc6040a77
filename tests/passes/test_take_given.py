"""passes/take_given.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.flatten_tokens import flatten_tokens
from llmc.passes.take_given import take_given
from llmc.runtime.errors import LlmcError

IS_GIVEN = np.array([0, 1, 0, 0, 1, 1])
"""Of six tokens."""


def scaled(build: Any) -> ir.Model:
    """Embeddings with a scale, and a product of them."""
    tokens, _ = build.token_inputs()
    embedded = build.op("Mul", build.op("Gather", build.weight("table", 11, 8), tokens), build.constant(2.0))
    model: ir.Model = build.model(build.op("llmc.Linear", build.op("llmc.Embedded", embedded), build.weight("w", 5, 8)))
    return model


def test_tokens_that_no_row_stands_for_keep_their_embeddings(build: Any, check: Any) -> None:
    check(scaled(build), take_given, 1)


def test_a_row_takes_the_place_of_an_embedding_with_its_scale(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]]
) -> None:
    model = scaled(build)
    inputs = feeds(model)
    (tokens_alone,) = graph.evaluate(model, inputs).values()
    take_given(model)
    given = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    (found,) = graph.evaluate(model, inputs | {"is_given": IS_GIVEN, "given": given}).values()
    weight = next(value for value in model.graph.initializers.values() if value.name == "w").const_value
    assert weight is not None
    wanted = np.where(IS_GIVEN[:, None], given @ weight.numpy().T, tokens_alone)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_the_mark_of_a_whole_sequence_becomes_one_of_tokens(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    embedded = build.op("Gather", build.weight("table", 11, 8), ids)
    model = build.model(build.op("Relu", build.op("llmc.Embedded", embedded)))
    flatten_tokens(model)
    assert take_given(model) == 1
    (node,) = (node for node in model.graph if node.op_type == "TakeGiven")
    assert [str(value.shape) for value in (*node.inputs[1:], *node.outputs)] == ["[M]", "[M,8]", "[M,8]"]


def test_embeddings_that_something_else_reads_are_refused(build: Any) -> None:
    tokens, _ = build.token_inputs()
    embedded = build.op("Gather", build.weight("table", 11, 8), tokens)
    model = build.model(build.op("Add", embedded, build.op("llmc.Embedded", embedded)))
    with pytest.raises(LlmcError, match="something else reads the tokens' embeddings too"):
        take_given(model)


@pytest.mark.parametrize("sizes", [(), (8, 4)])
def test_embeddings_of_no_size_or_several_are_refused(build: Any, sizes: tuple[int, ...]) -> None:
    tokens, _ = build.token_inputs()
    rows = [build.op("Gather", build.weight(f"table.{size}", 11, size), tokens) for size in sizes or (8,)]
    results = [build.op("llmc.Embedded" if sizes else "Relu", row) for row in rows]
    with pytest.raises(LlmcError, match=f"the tokens have embeddings of {len(sizes)} sizes"):
        take_given(build.model(*results))


def deepened(build: Any, *, is_read: bool = False) -> ir.Model:
    """Embeddings, and two layers to whose results rows add; is_read: what the first makes is read by itself too."""
    tokens, _ = build.token_inputs()
    x = build.op("llmc.Embedded", build.op("Gather", build.weight("table", 11, 8), tokens))
    for part in (1, 2):
        made = build.op("llmc.Linear", x, build.weight(f"w.{part}", 8, 8))
        x = build.op("llmc.Deepened", made, part=part)
        x = build.op("Add", x, made) if is_read else x
    model: ir.Model = build.model(build.op("Relu", x))
    return model


def test_rows_add_to_the_results_of_layers(build: Any, check: Any) -> None:
    check(deepened(build), take_given, 3)


def test_what_rows_add_is_a_part_of_them_for_each_layer(
    build: Any, feeds: Callable[[ir.Model], dict[str, Any]]
) -> None:
    model = deepened(build)
    take_given(model)
    given = np.random.default_rng(0).normal(size=(6, 24)).astype(np.float32)
    inputs = feeds(model) | {"is_given": IS_GIVEN, "given": given}
    (found,) = graph.evaluate(model, inputs).values()
    weights = {str(value.name): value.const_value for value in model.graph.initializers.values()}
    mark = IS_GIVEN[:, None] != 0
    x = np.where(mark, given[:, :8], weights["table"].numpy()[inputs["tokens"]])  # type: ignore[union-attr]
    for part in (1, 2):
        x = x @ weights[f"w.{part}"].numpy().T + mark * given[:, 8 * part : 8 * part + 8]  # type: ignore[union-attr]
    np.testing.assert_allclose(found, np.maximum(x, 0), rtol=0, atol=1e-5)


def test_results_that_something_else_reads_are_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="something else reads what a layer makes too"):
        take_given(deepened(build, is_read=True))

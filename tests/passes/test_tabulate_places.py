"""passes/tabulate_places.py"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.weights import Weight
from llmc.passes.tabulate_places import tabulate_places
from llmc.runtime.errors import LlmcError

N, N_PLACES = 4, 9
tabulate: Callable[[ir.Model], int] = partial(tabulate_places, n_places=N_PLACES)


def waves(build: Any) -> Any:
    """cos [N, 6] of angles that places say, line and column each a part of its columns."""
    place = build.input("place", N, 2, dtype=ir.DataType.INT64)
    numbers = build.op("Cast", build.op("Unsqueeze", place, build.constant([2])), to=int(ir.DataType.FLOAT))
    wave = build.op("Cos", build.op("Mul", numbers, build.weight("frequencies", 3)))
    axes = (build.constant(ir.tensor(np.array(axis))) for axis in (0, 1))
    return build.op("Concat", *(build.op("Gather", wave, axis, axis=1) for axis in axes), axis=-1)


def test_what_places_say_is_looked_up_to_the_bit(build: Any, golden: Any) -> None:
    x = build.input("pixels", N, 6)
    model = build.model(build.op("Mul", x, waves(build)))
    before, pixels = graph.to_text(model), np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
    place = np.array([[0, 8], [3, 2], [8, 0], [5, 5]])
    (wanted,) = graph.evaluate(model, {"pixels": pixels, "place": place}).values()
    assert tabulate(model) == 1
    after = graph.to_text(model)
    golden(f"{before}\n\n// tabulate_places\n\n{after}")
    feeds = {"pixels": pixels, "line": place[:, 0], "column": place[:, 1]}
    (found,) = graph.evaluate(model, feeds).values()
    assert np.array_equal(found, wanted)
    assert tabulate(model) == 0
    assert graph.to_text(model) == after


def test_an_element_that_depends_on_both_is_refused_when_it_is_read(build: Any) -> None:
    place = build.input("place", N, 2, dtype=ir.DataType.INT64)
    numbers = build.op("Cast", place, to=int(ir.DataType.FLOAT))
    model = build.model(build.op("Mul", build.input("x", N, 3), build.op("MatMul", numbers, build.weight("w", 2, 3))))
    assert tabulate(model) == 1
    tables = [value.const_value for value in model.graph.initializers.values()]
    table = next(table for table in tables if isinstance(table, Weight) and str(table.name).startswith("table."))
    with pytest.raises(LlmcError, match="an element depends on a patch's line and on its column"):
        table.stored()


def test_what_is_no_row_for_each_patch_is_refused(build: Any) -> None:
    place = build.input("place", N, 2, dtype=ir.DataType.INT64)
    numbers = build.op("Unsqueeze", build.op("Cast", place, to=int(ir.DataType.FLOAT)), build.constant([1]))
    model = build.model(build.op("Mul", build.input("x", N, 3, 2), numbers))
    with pytest.raises(LlmcError, match="what places are made into is not a row for each"):
        tabulate(model)

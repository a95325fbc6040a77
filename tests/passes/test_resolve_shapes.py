"""passes/resolve_shapes.py"""

from typing import Any

import pytest

from llmc.passes.resolve_shapes import resolve_shapes
from llmc.runtime.errors import LlmcError


def sizes_of(build: Any, value: Any) -> tuple[Any, Any]:
    """The batch and the sequence of a value, as old exporters take them."""
    shape = build.op("Shape", value)
    scalars = (build.op("Gather", shape, build.constant(ints(build, axis)), shape=()) for axis in (0, 1))
    vectors = [build.op("Unsqueeze", scalar, build.constant([0])) for scalar in scalars]
    return vectors[0], vectors[1]


def ints(build: Any, number: int) -> Any:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(np.array(number, np.int64))


def test_sizes_are_numbers_the_batch_and_the_sequence(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    batch, sequence = sizes_of(build, x)
    width = build.op("Shape", x, start=2, end=3)
    half = build.op("Div", width, build.constant([2]))
    four_d = build.op("Concat", batch, sequence, build.constant([2]), half, axis=0, shape=(4,))
    heads = build.op("Reshape", x, four_d, shape=("batch", "sequence", 2, 4))
    first = build.op("Slice", heads, build.constant([0]), build.op("Div", half, build.constant([2])),
                     build.constant([3]), shape=("batch", "sequence", 2, 2))  # fmt: skip
    scale = build.op("Sqrt", build.op("Cast", half, to=1))
    check(build.model(build.op("Div", first, scale)), resolve_shapes, 10)


def test_equal_parts_become_one_whatever_they_took_sizes_from(build: Any, check: Any) -> None:
    ids, positions = build.sequence_inputs()
    zero, one = (build.constant(ints(build, number)) for number in (0, 1))
    counted = []
    for value in (ids, build.op("Gather", build.weight("p", 11, 8), positions)):
        _, sequence = sizes_of(build, value)
        counted.append(build.op("Range", zero, build.op("Squeeze", sequence, shape=()), one, shape=("sequence",)))
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    axes = build.constant([0, 2])
    places = [build.op("Unsqueeze", build.op("Cast", value, to=1), axes) for value in counted]
    check(build.model(build.op("Add", build.op("Add", x, places[0]), places[1])), resolve_shapes, 8)


def test_nothing_is_left_out_of_a_concat(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Unsqueeze", build.op("Gather", build.weight("w", 11, 4), ids), build.constant([1]))
    sizes = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant([1, 0, 4]), axis=0)
    nothing = build.op("Expand", build.weight("nothing", 1, 1, 0, 4), sizes, shape=("batch", 1, 0, 4))
    check(build.model(build.op("Concat", nothing, x, axis=2, shape=("batch", 1, "sequence", 4))), resolve_shapes, 1)


def test_noise_is_refused_by_name(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    noise = build.op("RandomNormalLike", build.weight("like", 8), shape=(8,))
    with pytest.raises(LlmcError, match="RandomNormalLike is not compiled"):
        resolve_shapes(build.model(build.op("Add", x, noise, shape=("batch", "sequence", 8))))


def test_sizes_that_make_more_and_more_numbers_are_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    many, n = build.op("Shape", x), 3
    for _ in range(40):
        many, n = build.op("Concat", many, many, axis=0, shape=(2 * n,)), 2 * n
    axes = build.op("Trilu", build.op("Unsqueeze", many, build.constant([0]), shape=(1, n)), shape=(1, n))
    with pytest.raises(LlmcError, match="a Concat makes too many numbers"):
        resolve_shapes(build.model(build.op("Reshape", x, axes, shape=("batch", "sequence", 8))))


def test_an_operator_without_a_rule_is_refused_by_name(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    found = build.op("Einsum", x, x, equation="bsk,btk->bst", shape=("batch", "sequence", "sequence"))
    with pytest.raises(LlmcError, match="Einsum is not compiled"):
        resolve_shapes(build.model(found))

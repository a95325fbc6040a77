"""passes/resolve_shapes.py"""

from functools import partial
from typing import Any

import pytest

from llmc.passes.resolve_shapes import resolve_shapes
from llmc.runtime.errors import LlmcError

run = partial(resolve_shapes, n_context=64)
run.__name__ = "resolve_shapes"  # type: ignore[attr-defined]


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
    check(build.model(build.op("Div", first, scale)), run, 10)


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
    check(build.model(build.op("Add", build.op("Add", x, places[0]), places[1])), run, 8)


def test_nothing_is_left_out_of_a_concat(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Unsqueeze", build.op("Gather", build.weight("w", 11, 4), ids), build.constant([1]))
    sizes = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant([1, 0, 4]), axis=0)
    nothing = build.op("Expand", build.weight("nothing", 1, 1, 0, 4), sizes, shape=("batch", 1, 0, 4))
    check(build.model(build.op("Concat", nothing, x, axis=2, shape=("batch", 1, "sequence", 4))), run, 1)


def length_of(build: Any, ids: Any) -> Any:
    return build.op("Shape", ids, start=1, end=2)


def less(build: Any, n: Any, op: str) -> Any:
    """n, but for lengths of which the comparison with 40 holds."""
    return build.op("Sub", n, build.op("Cast", build.op(op, n, build.constant([40])), to=7))


BENT = {
    "Min": lambda build, n: build.op("Min", n, build.constant([40])),
    "Mod": lambda build, n: build.op("Mod", n, build.constant([40])),
    "Div": lambda build, n: build.op("Sub", n, build.op("Div", n, build.constant([40]))),
    "Greater": lambda build, n: less(build, n, "Greater"),
    "Equal": lambda build, n: less(build, n, "Equal"),
}
"""The length for 11 tokens and for 13, and not for all up to 64."""


@pytest.mark.parametrize("op", BENT)
def test_a_size_that_is_another_one_for_long_sequences_is_refused(build: Any, op: str) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    end = BENT[op](build, length_of(build, ids))
    cut = build.op("Slice", x, build.constant([0]), end, build.constant([1]), shape=("batch", "sequence", 8))
    with pytest.raises(LlmcError, match=r"Slice gives a size of \d+ for 4[01] tokens, which is sequence") as refusal:
        run(build.model(build.op("Neg", cut)))
    assert "--max-seq of less than 4" in str(refusal.value.hint)


def test_sizes_that_do_not_fit_for_one_token_are_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    size = build.op("Max", length_of(build, ids), build.constant([8]))
    sizes = build.op("Concat", build.constant([1]), size, build.constant([8]), axis=0)
    with pytest.raises(LlmcError, match=r"for sequences of \d tokens"):
        run(build.model(build.op("Expand", x, sizes, shape=("batch", "sequence", 8))))


def test_a_slice_that_cuts_long_sequences_is_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    cut = build.op("Slice", x, build.constant([0]), build.constant([40]), build.constant([1]), shape=x.shape)
    with pytest.raises(LlmcError, match="a Slice gives a size of 40 for 41 tokens, which is sequence for 11"):
        run(build.model(build.op("Neg", cut)))


def test_a_size_that_bends_beyond_the_longest_sequence_does_not_matter(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    end = build.op("Min", length_of(build, ids), build.constant([64]))
    cut = build.op("Slice", x, build.constant([0]), end, build.constant([1]), shape=("batch", "sequence", 8))
    check(build.model(build.op("Neg", cut)), run, 1)


def test_noise_is_refused_by_name(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    noise = build.op("RandomNormalLike", build.weight("like", 8), shape=(8,))
    with pytest.raises(LlmcError, match="RandomNormalLike is not compiled"):
        run(build.model(build.op("Add", x, noise, shape=("batch", "sequence", 8))))


def test_sizes_that_make_more_and_more_numbers_are_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    many, n = build.op("Shape", x), 3
    for _ in range(40):
        many, n = build.op("Concat", many, many, axis=0, shape=(2 * n,)), 2 * n
    axes = build.op("Trilu", build.op("Unsqueeze", many, build.constant([0]), shape=(1, n)), shape=(1, n))
    with pytest.raises(LlmcError, match="a Concat makes too many numbers"):
        run(build.model(build.op("Reshape", x, axes, shape=("batch", "sequence", 8))))


def test_an_operator_without_a_rule_is_refused_by_name(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("w", 11, 8), ids)
    found = build.op("Einsum", x, x, equation="bsk,btk->bst", shape=("batch", "sequence", "sequence"))
    with pytest.raises(LlmcError, match="Einsum is not compiled"):
        run(build.model(found))

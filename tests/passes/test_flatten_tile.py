"""passes/flatten_tile.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler.graph import op_name
from llmc.passes.flatten_tile import flatten_tile
from llmc.runtime.errors import LlmcError

HEADS = [0, 2, 1, 3]
N, WIDTH = 6, 8  # patches, and what each is in the tower


def patches(build: Any, height: Any = 8, width: Any = 12, **attributes: Any) -> Any:
    """[1, 6, 8] of pixels, as transformers writes it."""
    tile = build.op("Unsqueeze", build.input("pixels", 3, height, width), build.constant([0]))
    how = {"kernel_shape": [4, 4], "strides": [4, 4], "pads": [0, 0, 0, 0], "dilations": [1, 1], **attributes}
    made = build.op(
        "Conv", tile, build.weight("kernel", WIDTH, 3, 4, 4), build.weight("bias", WIDTH), shape=(1, 8, 2, 3), **how
    )
    flat = build.op("Reshape", made, build.constant([1, WIDTH, -1]))
    return build.op("Transpose", flat, perm=[0, 2, 1])


def attended(build: Any, x: Any, n: Any = N, **attributes: Any) -> Any:
    def heads(name: str) -> Any:
        y = build.op("MatMul", x, build.weight(name, WIDTH, WIDTH))
        return build.op("Transpose", build.op("Reshape", y, build.constant([1, n, 2, 4])), perm=HEADS)

    y = build.op("Attention", heads("q"), heads("k"), heads("v"), **{"is_causal": 0, "scale": 0.5, **attributes})
    return build.op("Reshape", build.op("Transpose", y, perm=HEADS), build.constant([1, n, WIDTH]))


def squeezed(build: Any, x: Any) -> Any:
    return build.op("Squeeze", x, build.constant([0]))


def test_patches_are_rows_of_a_product_and_attend_each_other(build: Any, check: Any) -> None:
    x = build.op("Add", patches(build), build.weight("places", 1, N, WIDTH))
    y = build.op("Add", attended(build, x), x)
    check(build.model(squeezed(build, y)), flatten_tile, 19)


def test_a_token_of_no_patch_comes_and_goes(build: Any, check: Any) -> None:
    x = build.op("Concat", build.weight("class", 1, 1, WIDTH), patches(build, 8, 12), axis=1)
    y = build.op("LayerNormalization", x, build.weight("w", WIDTH), build.weight("b", WIDTH), axis=2)
    ends = [build.constant([at]) for at in (1, 1 << 62, 1, 1)]
    check(build.model(squeezed(build, build.op("Slice", y, *ends))), flatten_tile, 8)


def test_rows_that_attend_others_have_it_written_out(build: Any, check: Any) -> None:
    def heads(x: Any, name: str, n_rows: int, n_heads: int) -> Any:
        y = build.op("MatMul", x, build.weight(name, WIDTH, 4 * n_heads))
        return build.op("Transpose", build.op("Reshape", y, build.constant([1, n_rows, n_heads, 4])), perm=HEADS)

    x = patches(build)
    few = build.op("Slice", x, *[build.constant([at]) for at in (0, 3, 1)])
    y = build.op("Attention", heads(few, "q", 3, 2), heads(x, "k", N, 1), heads(x, "v", N, 1), is_causal=0, scale=0.5)
    rows = build.op("Reshape", build.op("Transpose", y, perm=HEADS), build.constant([1, 3, WIDTH]))
    check(build.model(squeezed(build, rows)), flatten_tile, 18)


def test_constants_that_are_chosen_by_or_attend_lose_their_axis_too(build: Any, check: Any) -> None:
    """What a model's code has worked out meanwhile is a constant: a mask, or queries that nothing has to make."""
    mask = build.constant(ir.tensor(np.arange(N).reshape(1, N, 1) % 2 == 0))
    x = build.op("Where", mask, patches(build), build.weight("blank", 1, 1, WIDTH))
    keys, values = (
        build.op("Transpose", build.op("Reshape", x, build.constant([1, N, 2, 4])), perm=HEADS) for _ in range(2)
    )
    y = build.op("Attention", build.weight("queries", 1, 2, 3, 4), keys, values, is_causal=0, scale=0.5)
    rows = build.op("Reshape", build.op("Transpose", y, perm=HEADS), build.constant([1, 3, WIDTH]))
    check(build.model(squeezed(build, rows)), flatten_tile, 13)


def test_pixels_are_shuffled_as_they_were(build: Any, check: Any) -> None:
    def shaped(x: Any, *sizes: int) -> Any:
        return build.op("Reshape", x, build.constant([1, *sizes]))

    halves = build.op("Transpose", shaped(patches(build), 2, 3, 2, 4), perm=[0, 3, 1, 2, 4])
    squares = build.op("Transpose", shaped(halves, 4, 2, 6), perm=[0, 2, 1, 3])
    product = build.op("MatMul", squares, build.weight("w", 6, 5))
    check(build.model(squeezed(build, shaped(product, 8, 5))), flatten_tile, 11)


def test_what_is_not_known_stays_between_reshapes(build: Any, check: Any) -> None:
    picture = build.op("Unsqueeze", build.input("pixels", 3, 4, 4), build.constant([0]))
    smaller = build.op("AveragePool", picture, shape=(1, 3, 2, 2), kernel_shape=[2, 2], strides=[2, 2])
    wide = build.op("Conv", smaller, build.weight("k", 5, 3, 2, 2), shape=(1, 5, 1, 1), kernel_shape=[2, 2])
    rows = build.op("Reshape", wide, build.constant([1, 5]))
    check(build.model(rows), flatten_tile, 4)


def test_a_border_that_makes_no_patch_is_cut_off(build: Any, check: Any) -> None:
    check(build.model(squeezed(build, patches(build, 9, 15))), flatten_tile, 5)


@pytest.mark.parametrize(
    "attributes", [{"strides": [3, 3]}, {"dilations": [2, 1]}, {"pads": [1, 0, 0, 0]}, {"group": 3}]
)
def test_patches_that_overlap_are_left_to_a_convolution(build: Any, attributes: Any) -> None:
    model = build.model(squeezed(build, patches(build, **attributes)))
    flatten_tile(model)
    assert "Conv" in {op_name(node) for node in model.graph}


@pytest.mark.parametrize(
    ("attributes", "fact"),
    [({"is_causal": 1}, "is causal"), ({"n": 4}, "numbers of rows")],
    ids=["causal", "two numbers of rows"],
)
def test_other_attention_is_refused(build: Any, attributes: Any, fact: str) -> None:
    x = patches(build)
    y = attended(build, x)
    if "n" in attributes:
        ends = [build.constant([at]) for at in (0, 4, 1)]
        y = attended(build, build.op("Slice", y, *ends), **attributes)
    else:
        y = attended(build, x, **attributes)
    with pytest.raises(LlmcError, match=fact):
        flatten_tile(build.model(squeezed(build, y)))

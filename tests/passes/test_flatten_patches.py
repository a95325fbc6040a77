"""passes/flatten_patches.py"""

from typing import Any

import onnx_ir as ir
import pytest

from llmc.compiler.graph import op_name
from llmc.passes.flatten_patches import flatten_patches
from llmc.runtime.errors import LlmcError

N, HEADS, D = 6, 2, 4
WIDTH = HEADS * D
PATCH = (3, 2, 2, 2)


def patches(build: Any, bias: bool = False, **attributes: Any) -> Any:
    """[N, WIDTH] of N patches, as transformers writes it."""
    pixels = build.op("Reshape", build.input("pixels", N, 24), build.constant([-1, *PATCH]))
    operands = [build.weight("kernel", WIDTH, *PATCH), *([build.weight("bias", WIDTH)] if bias else [])]
    how = {"kernel_shape": PATCH[1:], "strides": PATCH[1:], "pads": [0] * 6, **attributes}
    made = build.op("Conv", pixels, *operands, shape=(N, WIDTH, 1, 1, 1), **how)
    return build.op("Reshape", made, build.constant([-1, WIDTH]))


def waves(build: Any, axis: int = -2) -> list[Any]:
    """Cosines and sines [N, 1, D] whose halves are the same."""
    angles = build.op("MatMul", build.input("angles", N, 2), build.weight("frequencies", 2, D // 2))
    made = []
    for function in ("Cos", "Sin"):
        half = build.op(function, angles)
        made.append(build.op("Unsqueeze", build.op("Concat", half, half, axis=-1), build.constant([axis])))
    return made


def turned(build: Any, x: Any, cos: Any, sin: Any) -> Any:
    ends = [[build.constant([at]) for at in part] for part in ((0, D // 2, 2, 1), (D // 2, 1 << 62, 2, 1))]
    first, second = (build.op("Slice", x, *part) for part in ends)
    swapped = build.op("Concat", build.op("Neg", second), first, axis=-1)
    return build.op("Add", build.op("Mul", x, cos), build.op("Mul", swapped, sin))


def parts(build: Any, x: Any) -> list[Any]:
    """Queries, keys and values [N, HEADS, D]."""
    made = build.op("MatMul", x, build.weight("qkv", WIDTH, 3 * WIDTH))
    first = build.op("Transpose", build.op("Reshape", made, build.constant([N, 3, HEADS, D])), perm=[1, 0, 2, 3])
    cuts = ([build.constant([at]) for at in (i, i + 1, 0)] for i in range(3))
    return [build.op("Squeeze", build.op("Slice", first, *cut), build.constant([0])) for cut in cuts]


def attended(build: Any, q: Any, k: Any, v: Any, **attributes: Any) -> Any:
    moved = (build.op("Transpose", x, perm=[1, 0, 2]) for x in (q, k, v))
    first = [build.op("Unsqueeze", x, build.constant([0])) for x in moved]
    y = build.op("Attention", *first, **{"is_causal": 0, "scale": 0.5, **attributes})
    return build.op("Reshape", build.op("Transpose", y, perm=[0, 2, 1, 3]), build.constant([N, WIDTH]))


def test_patches_are_turned_and_attend_each_other_as_rows(build: Any, check: Any) -> None:
    x = patches(build)
    (q, k, v), (cos, sin) = parts(build, x), waves(build)
    y = attended(build, turned(build, q, cos, sin), turned(build, k, cos, sin), v)
    check(build.model(build.op("Add", x, y)), flatten_patches, 7)


def test_a_bias_and_one_result_of_a_split_stay_what_they_are(build: Any, check: Any) -> None:
    made = build.op("Split", patches(build, bias=True), build.constant([N]), axis=0)
    check(build.model(build.op("Relu", made)), flatten_patches, 2)


@pytest.mark.parametrize("attributes", [{"pads": [0, 1, 1, 0, 0, 0]}, {"group": 3}])
def test_other_convolutions_stay(build: Any, attributes: Any) -> None:
    model = build.model(patches(build, **attributes))
    assert flatten_patches(model) == 0
    assert "Conv" in {op_name(node) for node in model.graph}


@pytest.mark.parametrize(("cut", "axis"), [(1, -2), (D // 2, 0)])
def test_heads_that_are_turned_otherwise_stay(build: Any, refused: Any, cut: int, axis: int) -> None:
    x = build.input("pixels", N, HEADS, D)
    cos, sin = waves(build) if axis else [build.input(name, N, 1, D) for name in ("cos", "sin")]
    ends = [[build.constant([at]) for at in part] for part in ((0, cut, 2, 1), (cut, D, 2, 1))]
    first, second = (build.op("Slice", x, *part) for part in ends)
    swapped = build.op("Concat", build.op("Neg", second), first, axis=-1)
    y = build.op("Add", build.op("Mul", x, cos), build.op("Mul", swapped, sin))
    refused(build.model(y), flatten_patches)


def test_attention_that_is_causal_or_of_some_patches_is_refused(build: Any) -> None:
    q, k, v = parts(build, patches(build))
    with pytest.raises(LlmcError, match="flatten_patches: Attention is causal, or has a mask or a cache"):
        flatten_patches(build.model(attended(build, q, k, v, is_causal=1)))


def test_attention_of_some_patches_is_refused(build: Any) -> None:
    q, k, v = parts(build, patches(build))
    ends = [build.constant([at]) for at in (0, D, 2)]
    first = [build.op("Slice", build.op("Unsqueeze", x, build.constant([0])), *ends) for x in (q, k, v)]
    y = build.op("Attention", *first, is_causal=0, scale=0.5)
    model: ir.Model = build.model(y)
    with pytest.raises(LlmcError, match="Attention is of something else than all patches"):
        flatten_patches(model)

"""passes/standardise_operators.py"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.frontend.onnx_file import STANDARDISED
from llmc.passes.resolve_shapes import resolve_shapes
from llmc.passes.standardise_operators import DOMAIN, RULES, standardise_operators
from llmc.runtime.errors import LlmcError

X = ("batch", "sequence", 8)


@pytest.fixture
def same(golden: Callable[[object], None], feeds: Any) -> Callable[..., None]:
    """The golden text, no operator of the domain left, and what ONNX Runtime says of both."""

    def run(model: ir.Model, n_rewrites: int = 1) -> None:
        model.graph.opset_imports[DOMAIN] = 1
        before, given = graph.to_text(model), feeds(model)
        wanted = graph.evaluate(model, given)
        assert standardise_operators(model) == n_rewrites
        assert DOMAIN not in {node.domain for node in model.graph}
        resolve_shapes(model, n_context=16)
        golden(f"{before}\n\n// standardise_operators, resolve_shapes\n\n{graph.to_text(model)}")
        for name, array in graph.evaluate(model, given).items():
            np.testing.assert_allclose(array, wanted[name], rtol=0, atol=2e-6)
        assert standardise_operators(model) == 0

    return run


def test_the_frontend_lets_through_what_has_a_rule() -> None:
    assert {f"{DOMAIN}.{name}" for name in STANDARDISED} == RULES.keys() - {"SimplifiedLayerNormalization", "GatherND"}


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [
        ("SimplifiedLayerNormalization", [(8,)], {"epsilon": 0.25, "stash_type": 1}),
        (f"{DOMAIN}.Gelu", [], {}),
        (f"{DOMAIN}.BiasGelu", [(8,)], {}),
        (f"{DOMAIN}.FastGelu", [(8,)], {}),
        (f"{DOMAIN}.QuickGelu", [], {}),
        (f"{DOMAIN}.QuickGelu", [], {"alpha": 1.0}),
    ],
    ids=["norm", "gelu", "bias_gelu", "fast_gelu", "quick_gelu", "silu"],
)
def test_norms_and_activations(build: Any, same: Any, op: str, shapes: list[Any], attributes: dict[str, Any]) -> None:
    build.sequence_inputs()
    weights = [build.weight(f"w.{index}", *shape) for index, shape in enumerate(shapes)]
    same(build.model(build.op(op, build.input("x", *X), *weights, shape=X, **attributes)))


def test_entries_that_are_looked_up_along_one_axis(build: Any, same: Any) -> None:
    _, positions = build.sequence_inputs()
    heads = build.op("Transpose", build.input("x", "batch", "sequence", 3, 4), perm=[2, 0, 1, 3])
    last = build.op("GatherND", heads, build.constant(ir.tensor([[-1]])), shape=(1, "batch", "sequence", 4))
    at = build.op("Unsqueeze", positions, build.constant([-1]))
    row = build.op("GatherND", build.weight("table", 16, 4), at, shape=("batch", "sequence", 4))
    same(build.model(build.op("Add", last, row)), 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_norms_of_a_sum_give_the_sum_too(build: Any, same: Any, kind: str, *, bias: bool) -> None:
    build.sequence_inputs()
    weights = [build.weight(f"w.{index}", 8) for index in range(2 if kind == "SkipLayerNormalization" else 1)]
    weights += [build.weight("bias", 8)] if bias else []
    x = [build.input(name, *X) for name in "ab"]
    normed, *others, total = build.op(f"{DOMAIN}.{kind}", *x, *weights, epsilon=0.25, n_results=4, shape=X)
    for other in others:
        other.name, other.shape, other.dtype = "", ir.Shape(("batch", "sequence", 1)), normed.dtype
    total.shape, total.dtype = normed.shape, normed.dtype
    same(build.model(build.op("Mul", normed, total)))


@pytest.mark.parametrize(("turned", "alpha"), [((0, 1), 0.25), ((1, 0), 1.0)], ids=["scores", "first"])
def test_fused_products(build: Any, same: Any, turned: tuple[int, int], alpha: float) -> None:
    build.sequence_inputs()
    a, b = (build.input(name, "batch", 2, "sequence", 4) for name in "ab")
    result = ("batch", 2, 4, 4) if turned[0] else ("batch", 2, "sequence", "sequence")
    settings = {"transA": turned[0], "transB": turned[1], "alpha": alpha, "shape": result}
    same(build.model(build.op(f"{DOMAIN}.FusedMatMul", a, b, **settings)))


def test_a_fused_gemm(build: Any, same: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Reshape", build.input("x", *X), build.constant([-1, 8]), shape=("M", 8))
    operands = [x, build.weight("w", 4, 8), build.weight("b", 4)]
    y = build.op(f"{DOMAIN}.FusedGemm", *operands, transB=1, activation="Relu", shape=("M", 4))
    sizes = build.op("Concat", build.op("Shape", ids), build.constant([4]), axis=0)
    same(build.model(build.op("Reshape", y, sizes, shape=("batch", "sequence", 4))))


def test_another_activation_of_a_gemm_is_refused(build: Any) -> None:
    x = build.op("Reshape", build.input("x", *X), build.constant([-1, 8]), shape=("M", 8))
    operands = [x, build.weight("w", 8, 4)]
    y = build.op(f"{DOMAIN}.FusedGemm", *operands, activation="LeakyRelu", shape=("M", 4))
    with pytest.raises(LlmcError, match="FusedGemm with 'LeakyRelu' is not compiled"):
        standardise_operators(build.model(y))


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(build: Any, same: Any, interleaved: int, *, heads: bool) -> None:
    _, positions = build.sequence_inputs()
    shape = ("batch", 2, "sequence", 4) if heads else X
    tables = [build.weight(name, 16, 2) for name in ("cos", "sin")]
    x = build.input("x", *shape)
    settings = {"interleaved": interleaved, "shape": shape}
    same(build.model(build.op(f"{DOMAIN}.RotaryEmbedding", x, positions, *tables, **settings)))


def attention(build: Any, *, packed: bool = False, more: int = 0, **attributes: Any) -> ir.Model:
    """Two query heads and one key head of 16 over a cache that holds nothing, lengths as the builder writes them."""
    ids, _ = build.sequence_inputs()
    length = build.op("Shape", ids, start=1, end=2)
    ones = build.op("Expand", build.constant([1]), build.op("Shape", ids), shape=("batch", "sequence"))
    summed = build.op("ReduceSum", ones, build.constant([1]), keepdims=0)
    last = build.op("Cast", build.op("Sub", summed, build.constant([1 + more])), to=6)
    total = build.op("Cast", build.op("Squeeze", length), to=6)
    sizes = build.op("Concat", build.op("Shape", ids, start=0, end=1), build.constant([1, 0, 16]), axis=0)
    past = [build.op("Expand", build.weight(f"nothing.{name}", 1, 1, 0, 16), sizes, shape=("batch", 1, 0, 16))
            for name in "kv"]  # fmt: skip
    qkv = [build.input(name, "batch", "sequence", n) for name, n in zip("qkv", (32, 16, 16), strict=True)]
    if packed:
        qkv = [build.op("Concat", *qkv, axis=2), None, None]
    tables = [build.weight(name, 16, 8) for name in ("cos", "sin")] if attributes.get("do_rotary") else []
    operands = [*qkv, *past, last, total, *tables]
    result, *present = build.op(f"{DOMAIN}.GroupQueryAttention", *operands, num_heads=2, kv_num_heads=1, n_results=3,
                                shape=("batch", "sequence", 32), **attributes)  # fmt: skip
    for value in present:
        value.shape, value.dtype = past[0].shape, past[0].dtype
    model: ir.Model = build.model(result)
    return model


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"do_rotary": 1, "packed": True, "local_window_size": -1, "k_quant_type": "NONE"},
        {"do_rotary": 1, "rotary_interleaved": 1, "scale": 0.5},
        {"local_window_size": 3},
        {"softcap": 2.0},
    ],
    ids=["plain", "rotary_packed", "interleaved_scaled", "window", "softcap"],
)
def test_grouped_attention(build: Any, same: Any, said: dict[str, Any]) -> None:
    same(attention(build, **said))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_many_heads(build: Any, same: Any, *, masked: bool) -> None:
    _, positions = build.sequence_inputs()
    x = [build.input(name, *X) for name in "qkv"]
    ends = [build.op("Unsqueeze", positions, build.constant(axes)) for axes in ([1, 3], [1, 2])]
    mask = build.op("Mul", build.op("Cast", build.op("Less", *ends), to=1), build.constant(-10000.0))
    said = {"scale": 0.5} if masked else {"unidirectional": 1}
    operands = [*x, build.weight("bias", 24), None, *([mask] if masked else [])]
    same(build.model(build.op(f"{DOMAIN}.MultiHeadAttention", *operands, num_heads=2, shape=X, **said)))


def test_a_cache_that_holds_something_is_refused(build: Any) -> None:
    build.sequence_inputs()
    x = [build.input(name, *X) for name in "qkv"]
    prefix = [build.weight(name, 1, 2, 3, 4) for name in ("keys", "values")]
    operands = [*x, None, None, None, *prefix]
    model = build.model(build.op(f"{DOMAIN}.MultiHeadAttention", *operands, num_heads=2, shape=X, unidirectional=1))
    with pytest.raises(LlmcError, match="has a cache of its own"):
        standardise_operators(model)


def test_other_lengths_than_the_masks_are_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="lengths that are not those of the attention mask"):
        standardise_operators(attention(build, more=1))


def test_what_has_no_definition_here_is_refused_by_name(build: Any) -> None:
    with pytest.raises(LlmcError, match=r"GroupQueryAttention with smooth_softmax=1 is not compiled"):
        standardise_operators(attention(build, smooth_softmax=1))

"""passes/append_in_product.py"""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.weights import Weight
from llmc.passes.append_in_product import append_in_product
from tests.passes.conftest import feeds_for

H, KH, D = 2, 1, 32


def attention(build: Any, qkv: Any, rotary_dim: int = 16, head_dim: int = D, interleaved: int = 0) -> Any:
    """A layer's attention to its result; the caches are results of the graph."""
    _, positions = build.token_inputs()
    table = build.input("page_table", "M", "P", dtype=ir.DataType.INT64)
    caches = [build.input(f"{kind}_cache.0", "n_pages", KH, 64, head_dim) for kind in "kv"]
    settings: dict[str, Any] = {"num_heads": H, "kv_num_heads": KH, "head_dim": head_dim, "scale": 0.2}
    settings |= {"softcap": 0.0, "window": 0, "layer": 0, "n_results": 3}
    angles = [build.input(name, "M", rotary_dim // 2) for name in ("cos", "sin")] if rotary_dim else []
    if rotary_dim:
        settings |= {"rotary_dim": rotary_dim, "interleaved": interleaved}
    op = "llmc.RotaryPagedAttention" if rotary_dim else "llmc.PagedAttention"
    out, *appended = build.op(op, qkv, *angles, positions, table, *caches, **settings)
    for cache, result in zip(caches, appended, strict=True):
        result.name = f"{cache.name}_out"
    return [build.op("Relu", out), *appended]


def stored(build: Any, name: str, n: int, k: int, dtype: Any = "bf16") -> Any:
    random = np.random.default_rng(n)
    return build.constant(
        Weight.of_array(name, random.normal(0, 0.3, (n, k)).astype(np.float32)).stored_as(dtype), name
    )


def product(build: Any, name: str = "Linear", heads: int = H + 2 * KH, head_dim: int = D) -> Any:
    n, x = heads * head_dim, build.input("x", "M", 16)
    vectors = [build.weight("g", 16)] * ("Norm" in name) + [build.weight("b", 16)] * ("LayerNorm" in name)
    bias = [build.weight("bias", n)] * ("Bias" in name)
    residual = [build.input("residual", "M", n)] * ("Residual" in name)
    options = {"epsilon": 1e-5} if vectors else {}
    return build.op(f"llmc.{name}", x, *vectors, stored(build, "W", n, 16), *bias, *residual, **options)


def model_of(build: Any, results: list[ir.Value]) -> ir.Model:
    results[0].name = "logits"
    model: ir.Model = build.model(*results)
    return model


@pytest.fixture
def rewrite() -> Any:
    found = partial(append_in_product, kv_dtype="bf16")
    found.__name__ = "append_in_product"  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", ["Linear", "RMSNormLinear", "LayerNormLinearBias"])
@pytest.mark.parametrize("rotary_dim", [0, 32])
def test_a_product_turns_and_appends(build: Any, golden: Any, rewrite: Any, name: str, rotary_dim: int) -> None:
    """The same numbers; a second time there is nothing to do; nodes have the names that they had."""
    model = model_of(build, attention(build, product(build, name), rotary_dim))
    for index, node in enumerate(model.graph):
        node.name = f"{index}.{node.op_type}"
    feeds = feeds_for(model)
    before, names = graph.to_text(model), [node.name for node in model.graph]
    wanted = graph.evaluate(model, feeds)
    assert rewrite(model) == 1
    golden(f"{before}\n\n// append_in_product\n\n{graph.to_text(model)}")
    for key, found in graph.evaluate(model, feeds).items():
        np.testing.assert_allclose(found, wanted[key], rtol=0, atol=2e-6)
    assert [node.name for node in model.graph] == names
    assert rewrite(model) == 0


def test_a_norm_that_is_deferred_is_put_on_x_again(build: Any, rewrite: Any) -> None:
    x, k = build.input("x", "M", 64), 64
    n = (H + 2 * KH) * D
    scaled, moments = build.input("scaled", "M", k), build.input("moments", k // 16, "M", 2)
    operands = (x, build.weight("g", k), stored(build, "W", n, k), scaled, moments)
    qkv = build.op("llmc.DeferredRMSNormLinear", *operands, epsilon=1e-5)
    model = model_of(build, attention(build, qkv))
    assert rewrite(model) == 1
    assert graph.count_ops(model)["llmc.RMSNormLinearRotaryAppend"] == 1
    assert not scaled.uses()


REFUSED: dict[str, Any] = {
    "a residual": lambda b: attention(b, product(b, "LinearResidual")),
    "an activation": lambda b: attention(b, product(b, "LinearGelu")),
    "something between": lambda b: attention(b, b.op("Relu", product(b))),
    "pairs of neighbours": lambda b: attention(b, product(b), interleaved=1),
    "pairs that are no multiple of 8 apart": lambda b: attention(b, product(b), rotary_dim=24),
    "heads that no tile holds": lambda b: attention(b, product(b, head_dim=48), 32, 48),
}


@pytest.mark.parametrize("what", REFUSED)
def test_is_left(build: Any, refused: Any, rewrite: Any, what: str) -> None:
    refused(model_of(build, REFUSED[what](build)), rewrite)


def test_another_user_of_qkv_and_a_cache_of_another_dtype_are_left(build: Any, refused: Any, rewrite: Any) -> None:
    qkv = product(build)
    results = attention(build, qkv)
    model = model_of(build, results)
    refused(model, partial(append_in_product, kv_dtype="int8"))
    refused(model, partial(append_in_product, kv_dtype="f16"))
    other = build.op("Relu", qkv)
    model.graph.append(other.producer())
    model.graph.outputs.append(other)
    refused(model, rewrite)

"""passes/form_linear.py"""

from typing import Any

import numpy as np

from llmc.passes.form_linear import form_linear


def test_product_with_a_transposed_weight_takes_the_weight_as_it_is(build: Any, check: Any) -> None:
    x, w = build.input("x", "M", 8), build.weight("proj.weight", 4, 8)
    check(build.model(build.op("MatMul", x, build.op("Transpose", w, perm=[1, 0]))), form_linear, 1)


def test_weight_by_columns_is_transposed_when_packed(build: Any, check: Any) -> None:
    check(build.model(build.op("MatMul", build.input("x", "M", 8), build.weight("w", 8, 4))), form_linear, 1)


def test_gemm_with_bias(build: Any, check: Any) -> None:
    x, w, b = build.input("x", "M", 8), build.weight("w", 4, 8), build.weight("b", 4)
    check(build.model(build.op("Gemm", x, w, b, transB=1, alpha=1.0, beta=1.0)), form_linear, 1)


def test_gemm_by_columns(build: Any, check: Any) -> None:
    x, w, b = build.input("x", "M", 8), build.weight("w", 8, 4), build.weight("b", 4)
    check(build.model(build.op("Gemm", x, w, b)), form_linear, 1)


def test_added_bias_is_taken_in(build: Any, check: Any) -> None:
    x, w = build.input("x", "M", 8), build.weight("w", 4, 8)
    product = build.op("MatMul", x, build.op("Transpose", w, perm=[1, 0]))
    check(build.model(build.op("Add", build.weight("b", 4), product)), form_linear, 2)


def test_transposed_weight_keeps_its_stored_dtype(build: Any) -> None:
    w = build.weight("w", 8, 4)
    w.const_value.stored_dtype = "bf16"
    model = build.model(build.op("MatMul", build.input("x", "M", 8), w))
    form_linear(model)
    turned = model.graph.initializers["w.T"].const_value
    assert turned.stored_dtype == "bf16"
    assert np.array_equal(turned.stored(), w.const_value.stored().T)


def test_bias_of_a_product_with_another_user_is_left(build: Any, check: Any) -> None:
    product = build.op("MatMul", build.input("x", "M", 8), build.weight("w", 8, 4))
    check(build.model(build.op("Add", product, build.weight("b", 4)), build.op("Relu", product)), form_linear, 1)


def test_product_of_activations_is_refused(build: Any, refused: Any) -> None:
    x = build.input("x", "M", 8)
    refused(build.model(build.op("MatMul", build.input("y", 4, "M"), x)), form_linear)


def test_three_axes_are_refused(build: Any, refused: Any) -> None:
    refused(build.model(build.op("MatMul", build.input("x", "M", 2, 8), build.weight("w", 8, 4))), form_linear)


def test_gemm_with_alpha_is_refused(build: Any, refused: Any) -> None:
    x, w, b = build.input("x", "M", 8), build.weight("w", 4, 8), build.weight("b", 4)
    refused(build.model(build.op("Gemm", x, w, b, transB=1, alpha=0.5)), form_linear)


def test_bias_of_another_shape_is_refused(build: Any, refused: Any) -> None:
    x, w, b = build.input("x", "M", 8), build.weight("w", 4, 8), build.weight("b", 1)
    refused(build.model(build.op("Gemm", x, w, b, transB=1)), form_linear)

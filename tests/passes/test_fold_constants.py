"""passes/fold_constants.py"""

from typing import Any

import numpy as np

from llmc.compiler.weights import Weight
from llmc.passes.fold_constants import fold_constants


def test_weight_plus_one_becomes_a_weight(build: Any, check: Any) -> None:
    weight = build.op("Add", build.weight("norm.weight", 8), build.constant(1.0))
    check(build.model(build.op("RMSNormalization", build.input("x", "M", 8), weight)), fold_constants, 1)


def test_chain_of_constants_becomes_one(build: Any, check: Any) -> None:
    half = build.op("Mul", build.op("Neg", build.constant(2.0)), build.constant(0.25))
    check(build.model(build.op("Mul", build.input("x", "M", 8), half)), fold_constants, 2)


def test_folded_weight_is_not_read(build: Any) -> None:
    def read() -> Any:
        raise AssertionError("read")

    weight = build.constant(Weight("w", (8,), read), "w")
    model = build.model(build.op("Mul", build.input("x", "M", 8), build.op("Neg", weight)))
    assert fold_constants(model) == 1
    assert [tuple(map(int, v.shape)) for v in model.graph.initializers.values()] == [(8,)]


def test_folded_weight_reads_what_onnx_runtime_computes(build: Any) -> None:
    weight = build.weight("w", 8)
    model = build.model(build.op("Mul", build.input("x", "M", 8), build.op("Neg", weight)))
    fold_constants(model)
    (folded,) = model.graph.initializers.values()
    assert np.array_equal(folded.const_value.numpy(), -weight.const_value.numpy())


def test_transposed_weight_is_refused(build: Any, refused: Any) -> None:
    matrix = build.op("Transpose", build.weight("w", 4, 8), perm=[1, 0])
    refused(build.model(build.op("MatMul", build.input("x", "M", 8), matrix)), fold_constants)


def test_comparison_of_a_weight_is_folded_with_what_uses_it(build: Any, check: Any) -> None:
    weight = build.weight("alpha", 8)
    positive = build.op("Where", build.op("Greater", weight, build.constant(0.0)), weight, build.op("Neg", weight))
    check(build.model(build.op("Mul", build.input("x", "M", 8), positive)), fold_constants, 2)

"""passes/arrange_experts.py"""

from typing import Any

import ml_dtypes
import numpy as np

from llmc.compiler.weights import Weight
from llmc.passes.arrange_experts import arrange_experts

TURN = [0, 2, 1]
END = 2**63 - 1


def every_other(build: Any, x: Any, start: int) -> Any:
    return build.op("Slice", x, *(build.constant([n]) for n in (start, END, 1, 2)))


def model(build: Any, gate_up: Any, down: Any, biases: Any = ()) -> Any:
    x, share = build.input("x", "M", 8), build.input("share", "M", 2)
    index = build.constant(Weight.of_array("index", np.ones((6, 2), np.int64).view(np.float64).astype(np.float32)))
    index = build.op("Cast", index, to=7)
    name, settings = "llmc.ExpertsSilu", {}
    if biases:
        name, settings = "llmc.ExpertsClampedSwishBias", {"alpha": 1.5, "limit": 0.5, "offset": 1.0}
    return build.model(build.op(name, x, index, share, gate_up, down, *biases, **settings))


def test_weights_that_lie_otherwise_are_rearranged_as_they_are_read(build: Any, check: Any) -> None:
    turned = build.op("Transpose", build.weight("gate_up", 3, 8, 10), perm=TURN)
    gate_up = build.op("Concat", every_other(build, turned, 0), every_other(build, turned, 1), axis=1)
    down = build.op("Transpose", build.weight("down", 3, 5, 8), perm=TURN)
    of_up = build.weight("gate_up_bias", 3, 10)
    of_up = build.op("Concat", every_other(build, of_up, 0), every_other(build, of_up, 1), axis=1)
    check(model(build, gate_up, down, (of_up, build.weight("down_bias", 3, 8))), arrange_experts, 3)


def test_a_weight_keeps_the_dtype_it_is_stored_in(build: Any) -> None:
    stored = np.arange(3 * 8 * 10).reshape(3, 8, 10).astype(ml_dtypes.bfloat16)
    turned = build.op("Transpose", build.constant(Weight.of_array("gate_up", stored), "gate_up"), perm=TURN)
    graph = model(build, turned, build.weight("down", 3, 8, 5))
    assert arrange_experts(graph) == 1
    (weight,) = (v.const_value for name, v in graph.graph.initializers.items() if name == "gate_up.rows")
    assert isinstance(weight, Weight)
    np.testing.assert_array_equal(weight.stored(), stored.transpose(TURN))
    assert weight.stored().dtype == stored.dtype


def test_what_changes_a_number_is_left(build: Any, refused: Any) -> None:
    doubled = build.op("Mul", build.weight("gate_up", 3, 10, 8), build.constant(2.0))
    refused(model(build, doubled, build.weight("down", 3, 8, 5)), arrange_experts)


def test_two_weights_are_left(build: Any, refused: Any) -> None:
    parts = [build.weight(name, 3, 5, 8) for name in ("gate", "up")]
    refused(model(build, build.op("Concat", *parts, axis=1), build.weight("down", 3, 8, 5)), arrange_experts)

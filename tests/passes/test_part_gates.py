"""passes/part_gates.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler.low_rank import Factors
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.weights import Weight
from llmc.passes.insert_adapters import insert_adapters
from llmc.passes.part_gates import part_gates
from llmc.passes.quantize_weights import quantize_weights
from llmc.runtime.errors import LlmcError

SIZES = {"num_k_heads": 2, "num_v_heads": 2, "key_dim": 8, "value_dim": 8, "scale": 1.0}


def mamba(
    build: Any,
    sizes: tuple[int, ...] = (32, 48, 2),
    gate: int = -1,
    op: str = "llmc.Linear",
    whole: bool = False,
    scaled: int = 0,
) -> Any:
    """A layer whose product makes what goes in and, in one of its parts, how much of it."""
    _, positions = build.token_inputs()
    x, slots = build.input("x", "M", 32), build.input("slots", "M", dtype=ir.DataType.INT64)
    bias = [build.weight("in.bias", sum(sizes))] if op.endswith("Bias") else []
    product = build.op(op, x, build.weight("in", sum(sizes), 32), *bias)
    if scaled:
        product = build.op("Mul", product, build.weight("factors", scaled))
    parts = build.op("Split", product, build.constant(list(sizes)), n_results=len(sizes), axis=-1)
    step = build.op("Softplus", build.op("Add", parts[gate], build.weight("dt.bias", 2)))
    g = build.op("Mul", step, build.weight("rate", 2))
    state = build.input("state.0", "n_slots", 2, 8, 8)
    settings = {"place": 0, **SIZES}
    qkv = parts[1] if gate else parts[2]
    y, _ = build.op("llmc.StatefulSelectiveRule", qkv, g, step, positions, slots, state, n_results=2, **settings)
    y = build.op("Concat", y, product if whole else parts[0], axis=-1)
    return build.model(build.op("llmc.Linear", y, build.weight("head", 8, 16 + (sum(sizes) if whole else sizes[0]))))


@pytest.mark.parametrize("op", ["llmc.Linear", "llmc.LinearBias"])
def test_what_says_how_a_state_goes_on_has_a_product_of_its_own(build: Any, check: Any, op: str) -> None:
    check(mamba(build, op=op), part_gates, 1)


def test_factors_of_columns_go_along(build: Any, check: Any) -> None:
    check(mamba(build, scaled=82), part_gates, 1)


def test_one_factor_of_all_is_left(build: Any, refused: Any) -> None:
    refused(mamba(build, scaled=1), part_gates)


@pytest.mark.parametrize("scaled", [0, 82])
def test_an_adapter_of_such_a_product_is_refused(build: Any, scaled: int) -> None:
    model = mamba(build, scaled=scaled)
    factors = Factors(*(Weight.of_array(name, np.ones(n, np.float32)) for name, n in (("a", (2, 32)), ("b", (82, 2)))))
    insert_adapters(model, added={"in": [factors]})
    with pytest.raises(LlmcError, match="cannot change what says how a state goes on") as error:
        part_gates(model)
    assert error.value.place == "weight in"


def test_all_but_that_is_quantised_then(build: Any) -> None:
    model = mamba(build)
    part_gates(model)
    assert quantize_weights(model, Scheme(8)) == 1
    assert {name for name in model.graph.initializers if "int8" in name} == {"in[0:80].int8"}


def test_gates_in_front_are_left(build: Any, refused: Any) -> None:
    refused(mamba(build, (2, 32, 48), gate=0), part_gates)


def test_a_product_that_is_taken_whole_too_is_left(build: Any, refused: Any) -> None:
    refused(mamba(build, whole=True), part_gates)

"""passes/form_gather.py"""

from typing import Any

from llmc.passes.form_gather import form_gather


def chosen(build: Any) -> Any:
    return build.op("TopK", build.input("x", "M", 6), build.constant([2]), n_results=2, axis=-1)[1]


def test_one_coordinate_is_a_number_of_a_row(build: Any, check: Any) -> None:
    index = build.op("Unsqueeze", chosen(build), build.constant([-1]))
    check(build.model(build.op("GatherND", build.weight("scale", 6), index)), form_gather, 1)


def test_two_coordinates_and_batches_stay(build: Any, refused: Any) -> None:
    both = build.op("GatherND", build.weight("table", 6, 6), chosen(build))
    rows = build.constant([[0], [2], [5]])
    of_batch = build.op("GatherND", build.weight("of_batch", 3, 6), rows, batch_dims=1)
    refused(build.model(build.op("Mul", both, build.op("ReduceSum", of_batch, keepdims=0))), form_gather)

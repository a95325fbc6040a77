"""passes/form_groups.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.form_groups import form_groups

T, E, G = "M", 8, 4


def best_groups(build: Any, scores: Any, best: int, kept: int, axis: int = -1) -> Any:
    """The numbers of the best groups, by the sum of their largest scores or by the largest alone."""
    groups = build.op("Reshape", scores, build.constant([-1, G, E // G]), shape=[T, G, E // G])
    last = build.constant([-1])
    if best == 1:
        good = build.op("ReduceMax", groups, last, keepdims=0)
    else:
        largest, _ = build.op("TopK", groups, build.constant([best]), axis=-1, n_results=2)
        good = build.op("ReduceSum", largest, last, keepdims=0)
    return build.op("TopK", good, build.constant([kept]), axis=axis, sorted=0, n_results=2)[1]


def masked(build: Any, scores: Any, index: Any, fill: float = -np.inf, filled: float = 1.0) -> Any:
    """The scores outside of these groups replaced, as transformers does it."""
    kept = index.shape[1]
    shape = build.op("Shape", index, shape=[2])
    shape.dtype = ir.DataType.INT64
    ones = build.op("ConstantOfShape", shape, value=ir.tensor(np.array([filled], np.float32)), shape=[T, kept])
    ones.dtype = ir.DataType.FLOAT
    group_shape = build.op("Concat", build.op("Shape", scores, start=0, end=1), build.constant([G]), axis=0)
    zeros = build.op("Expand", build.constant(0.0), group_shape, shape=[T, G])
    mask = build.op("ScatterElements", zeros, index, ones, axis=1, shape=[T, G])
    column = build.op("Unsqueeze", mask, build.constant([-1]))
    spread = build.op("Expand", column, build.constant([1, G, E // G]))
    whole = build.op("Cast", build.op("Reshape", spread, build.constant([-1, E]), shape=[T, E]), to=ir.DataType.BOOL)
    return build.op("Where", build.op("Not", whole), build.constant(fill), scores)


@pytest.fixture
def scores(build: Any) -> Any:
    return build.op("Sigmoid", build.op("MatMul", build.input("x", T, 6), build.weight("router", 6, E)))


@pytest.mark.parametrize(("best", "fill"), [(2, -np.inf), (1, 0.0)])
def test_scores_of_other_groups_are_replaced(build: Any, scores: Any, check: Any, best: int, fill: float) -> None:
    kept = masked(build, scores, best_groups(build, scores, best, 2), fill)
    check(build.model(build.op("TopK", kept, build.constant([3]), axis=-1, n_results=2)[1]), form_groups, 1)


def test_where_all_groups_are_kept_there_are_none(build: Any, scores: Any, check: Any) -> None:
    kept = masked(build, scores, best_groups(build, scores, 2, G))
    check(build.model(build.op("Neg", kept)), form_groups, 1)


def test_groups_of_other_scores_are_refused(build: Any, scores: Any, refused: Any) -> None:
    index = best_groups(build, build.op("Neg", scores), 2, 2)
    refused(build.model(masked(build, scores, index)), form_groups)


def test_groups_that_are_chosen_among_tokens_are_refused(build: Any, scores: Any, refused: Any) -> None:
    index = best_groups(build, scores, 2, 2, axis=0)
    refused(build.model(masked(build, scores, index)), form_groups)


def test_a_mask_of_other_numbers_is_refused(build: Any, scores: Any, refused: Any) -> None:
    refused(build.model(masked(build, scores, best_groups(build, scores, 2, 2), filled=2.0)), form_groups)

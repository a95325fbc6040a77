"""What routers ask for: the largest of each row, and the best groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import Target
from llmc.schedules.cpu import top_k

Array = np.ndarray[Any, Any]
Run = Callable[..., list[Array]]


def top_k_call(rows: int, columns: int, k: int, **attributes: Any) -> Call:
    x, out = TensorType((rows, columns), "f32"), (rows, k)
    settings = {"axis": -1, "input.1": (k,), "largest": 1, "sorted": 1, **attributes}
    operands = (x, TensorType((1,), "i64", constant=True))
    return Call("TopK", operands, (TensorType(out, "f32"), TensorType(out, "i64")), tuple(sorted(settings.items())))


def scores_with_ties(rows: int, columns: int) -> Array:
    """Eighths, so that many are equal; a row of -inf but for two, and one of -inf alone."""
    scores = np.random.default_rng(0).integers(0, 8, (rows, columns)).astype(np.float32) / 8
    scores[1, 2:] = -np.inf
    scores[2] = -np.inf
    return scores


def test_of_equals_the_first_comes_first(run: Run, host: Target) -> None:
    call, scores = top_k_call(5, 12, 4), scores_with_ties(5, 12)
    assert schedules.implement(call, host).rule == "top_k"
    values, indices = run(call, scores, np.array([4]), target=host, n_tasks=3)
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(indices, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, wanted, 1))


def test_numbers_that_cannot_be_compared_give_places_within_the_row(run: Run, host: Target) -> None:
    scores = np.full((5, 12), np.nan, np.float32)
    _, indices = run(top_k_call(5, 12, 4), scores, np.array([4]), target=host)
    assert indices.min() >= 0
    assert indices.max() < 12


def test_the_smallest_and_other_axes_are_left_to_others(host: Target) -> None:
    assert top_k.match_top_k(top_k_call(5, 12, 4, largest=0), host) is None
    assert top_k.match_top_k(top_k_call(5, 12, 4, axis=0), host) is None


@pytest.mark.parametrize(("best", "fill"), [(2, -np.inf), (1, 0.0)])
def test_the_best_groups_are_kept(run: Run, define: Any, host: Target, best: int, fill: float) -> None:
    scores = scores_with_ties(7, 12)
    shape = TensorType(scores.shape, "f32")
    settings = {"num_groups": 4, "kept": 2, "best": best, "fill": fill}
    call = Call("llmc.KeepGroups", (shape,), (shape,), tuple(sorted(settings.items())))
    (kept,) = run(call, scores, target=host, n_tasks=3)
    np.testing.assert_array_equal(kept, define(call, scores)[0])

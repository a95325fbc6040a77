"""passes/fuse_router.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from llmc.passes.fuse_router import fuse_router

K, E, N = 8, 6, 4


def top_k(build: Any, scores: Any, k: int = 2, **attributes: Any) -> Any:
    settings = {"axis": -1, "largest": 1, "sorted": 1, **attributes}
    return build.op("TopK", scores, build.constant([k]), n_results=2, **settings)


def over_sum(build: Any, shares: Any, least: float | None = None) -> Any:
    total = build.op("ReduceSum", shares, build.constant([1]), keepdims=1)
    return build.op("Div", shares, total if least is None else build.op("Clip", total, build.constant(least)))


def by_softmax(build: Any, x: Any) -> Any:
    shares, index = top_k(build, build.op("Softmax", x, axis=-1))
    return over_sum(build, shares), index


def as_they_are(build: Any, x: Any) -> Any:
    shares, index = top_k(build, build.op("Softmax", x, axis=-1))
    return build.op("Mul", shares, build.constant(2.5)), index


def by_sigmoid(build: Any, x: Any, groups: bool = False, scores: str = "Sigmoid") -> Any:
    made = build.op(scores, x)
    better = build.op("Add", made, build.weight("bias", E))
    if groups:
        better = build.op("llmc.KeepGroups", better, num_groups=3, kept=2, best=1, fill=-1.0)
    _, index = top_k(build, better)
    return over_sum(build, build.op("GatherElements", made, index, axis=1), 1e-3), index


def of_the_largest(build: Any, x: Any) -> Any:
    largest, index = top_k(build, x)
    return build.op("Softmax", largest, axis=-1), index


def of_other_scores(build: Any, x: Any) -> Any:
    _, index = top_k(build, build.op("Softmax", x, axis=-1))
    return build.op("GatherElements", x, index, axis=1), index


def by_the_smallest(build: Any, x: Any) -> Any:
    return top_k(build, build.op("Softmax", x, axis=-1), largest=0)


def layer(build: Any, router: Any) -> Any:
    h = build.input("h", "M", K)
    share, index = router(build, build.op("llmc.Linear", h, build.weight("gate", E, K)))
    weights = build.weight("gate_up", E, 2 * N, K), build.weight("down", E, K, N)
    return build.model(build.op("llmc.ExpertsSilu", h, index, share, *weights))


ROUTERS: dict[str, Any] = {
    "softmax": by_softmax,
    "scaled": as_they_are,
    "groups": partial(by_sigmoid, groups=True),
    "largest": of_the_largest,
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_becomes_one_operator(build: Any, check: Any, kind: str) -> None:
    check(layer(build, ROUTERS[kind]), fuse_router, 1)


REFUSED: dict[str, Any] = {
    "other scores": of_other_scores,
    "the smallest": by_the_smallest,
    "another function": partial(by_sigmoid, scores="Tanh"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_routers_are_refused(build: Any, refused: Any, kind: str) -> None:
    refused(layer(build, REFUSED[kind]), fuse_router)

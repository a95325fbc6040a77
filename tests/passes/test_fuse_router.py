"""passes/fuse_router.py"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from llmc.compiler.refuse_for_gpu import refuse_for_gpu
from llmc.passes.fuse_router import fuse_router
from llmc.runtime.errors import LlmcError

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


def with_scales(build: Any, x: Any) -> Any:
    """Gemma 4's, of each expert."""
    share, index = by_softmax(build, x)
    return build.op("Mul", share, build.op("Gather", build.weight("scales", E), index, axis=0)), index


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


def of_size(build: Any, x: Any, k: int = 2, groups: dict[str, int] | None = None) -> Any:
    scores = build.op("Sigmoid", x)
    kept = build.op("llmc.KeepGroups", scores, kept=2, fill=-1.0, **groups) if groups else scores
    _, index = top_k(build, kept, k)
    return build.op("GatherElements", scores, index, axis=1), index


def layer(build: Any, router: Any, n_experts: int = E) -> Any:
    h = build.input("h", "M", K)
    share, index = router(build, build.op("llmc.Linear", h, build.weight("gate", n_experts, K)))
    weights = build.weight("gate_up", n_experts, 2 * N, K), build.weight("down", n_experts, K, N)
    return build.model(build.op("llmc.ExpertsSilu", h, index, share, *weights))


ROUTERS: dict[str, Any] = {
    "softmax": by_softmax,
    "softmax, scales of experts": with_scales,
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


SIZES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "most choices": (40, {"k": 32}, True),
    "more choices": (40, {"k": 33}, False),
    "more experts": (1025, {}, False),
    "most groups": (64, {"groups": {"num_groups": 32, "best": 2}}, True),
    "more groups": (66, {"groups": {"num_groups": 33, "best": 2}}, False),
    "sums of three": (12, {"groups": {"num_groups": 3, "best": 3}}, False),
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_router_stays_in_parts_where_there_is_no_kernel_of_its_size(build: Any, kind: str) -> None:
    """One that chooses among groups is refused by name then."""
    n_experts, settings, fits = SIZES[kind]
    model = layer(build, partial(of_size, **settings), n_experts)
    assert fuse_router(model) == fits
    assert any(node.op_type.startswith("Router") for node in model.graph) == fits
    if fits or "groups" not in settings:
        refuse_for_gpu(model)
    else:
        with pytest.raises(LlmcError, match="routers that choose among groups"):
            refuse_for_gpu(model)

"""passes/fuse_experts.py"""

from __future__ import annotations

from typing import Any

from llmc.passes.fuse_experts import fuse_experts

K, E, N = 8, 3, 4


def experts(build: Any) -> Any:
    x, share = build.input("x", "M", K), build.input("share", "M", 2)
    shares, index = build.op("TopK", share, build.constant([2]), n_results=2, axis=-1, largest=1, sorted=1)
    weights = build.weight("gate_up", E, 2 * N, K), build.weight("down", E, K, N)
    return build.op("llmc.ExpertsSilu", x, index, shares, *weights)


def test_a_residual_is_added_by_the_experts(build: Any, check: Any) -> None:
    check(build.model(build.op("Add", build.input("r", "M", K), experts(build))), fuse_experts, 1)


def test_a_constant_and_another_shape_are_no_residual(build: Any, refused: Any) -> None:
    y = build.op("Add", build.op("Add", experts(build), build.weight("b", K)), build.input("r", "M", K))
    refused(build.model(y), fuse_experts)


def test_experts_with_another_user_are_left(build: Any, refused: Any) -> None:
    y = experts(build)
    model = build.model(build.op("Add", y, build.input("r", "M", K)))
    y.name = "seen"
    model.graph.outputs.append(y)
    refused(model, fuse_experts)

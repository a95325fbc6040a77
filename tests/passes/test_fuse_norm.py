"""passes/fuse_norm.py"""

from typing import Any

from llmc.passes.fuse_norm import fuse_norm


def test_residual_add_moves_into_rms_norm(build: Any, check: Any) -> None:
    x, r = build.input("x", "M", 8), build.input("r", "M", 8)
    total = build.op("Add", x, r)
    normed = build.op("RMSNormalization", total, build.weight("w", 8), axis=-1, epsilon=1e-6)
    check(build.model(total, normed), fuse_norm, 1)


def test_residual_add_moves_into_layer_norm(build: Any, check: Any) -> None:
    x, r = build.input("x", "M", 8), build.input("r", "M", 8)
    w, b = build.weight("w", 8), build.weight("b", 8)
    check(build.model(build.op("LayerNormalization", build.op("Add", x, r), w, b, epsilon=1e-5)), fuse_norm, 1)


def test_sum_stays_in_front_of_its_other_users(build: Any, check: Any) -> None:
    x, r = build.input("x", "M", 8), build.input("r", "M", 8)
    total = build.op("Add", x, r)
    early = build.op("Relu", total)
    normed = build.op("RMSNormalization", total, build.weight("w", 8), epsilon=1e-6)
    check(build.model(build.op("Add", early, normed)), fuse_norm, 1)


def test_the_layers_own_result_comes_first(build: Any, check: Any) -> None:
    x, r = build.input("x", "M", 8), build.input("r", "M", 8)
    y = build.op("llmc.Linear", x, build.weight("W", 8, 8))
    normed = build.op("RMSNormalization", build.op("Add", r, y), build.weight("w", 8), epsilon=1e-6)
    check(build.model(normed), fuse_norm, 1)


def test_second_norm_of_a_sum_stands_alone(build: Any, check: Any) -> None:
    x, r = build.input("x", "M", 8), build.input("r", "M", 8)
    total = build.op("Add", x, r)
    one, two = (build.op("RMSNormalization", total, build.weight(name, 8), epsilon=1e-6) for name in "ab")
    check(build.model(one, two), fuse_norm, 1)


def test_added_bias_is_refused(build: Any, refused: Any) -> None:
    total = build.op("Add", build.input("x", "M", 8), build.weight("b", 8))
    refused(build.model(build.op("RMSNormalization", total, build.weight("w", 8))), fuse_norm)


def test_layer_norm_without_bias_is_refused(build: Any, refused: Any) -> None:
    total = build.op("Add", build.input("x", "M", 8), build.input("r", "M", 8))
    refused(build.model(build.op("LayerNormalization", total, build.weight("w", 8))), fuse_norm)


def test_broadcast_sum_is_refused(build: Any, refused: Any) -> None:
    total = build.op("Add", build.input("x", "M", 8), build.input("r", "M", 1))
    refused(build.model(build.op("RMSNormalization", total, build.weight("w", 8))), fuse_norm)


def test_norm_over_more_than_the_last_axis_is_refused(build: Any, refused: Any) -> None:
    total = build.op("Add", build.input("x", "M", 4, 2), build.input("r", "M", 4, 2))
    refused(build.model(build.op("RMSNormalization", total, build.weight("w", 4, 2), axis=1)), fuse_norm)

"""passes/fold_query_scale.py"""

from typing import Any

from llmc.passes.fold_query_scale import fold_query_scale

ATTENTION = {"num_heads": 2, "kv_num_heads": 2, "scale": 1.0, "softcap": 0.0, "window": 0, "layer": 0}


def qkv(build: Any) -> Any:
    return [build.input(name, "M", 8) for name in "qkv"]


def test_scale_of_queries_moves_into_attention(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    q = build.op("Mul", q, build.constant(0.25))
    check(build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION)), fold_query_scale, 1)


def test_scale_passes_through_rotary(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    angles = build.input("cos", "M", 2), build.input("sin", "M", 2)
    q = build.op("Mul", build.constant(0.25), q)
    q = build.op("llmc.Rotary", q, *angles, num_heads=2, rotary_dim=4, interleaved=0)
    check(build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION)), fold_query_scale, 1)


def test_scales_in_a_row_multiply(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    q = build.op("Mul", build.op("Mul", q, build.constant(0.25)), build.constant(0.5))
    check(build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION)), fold_query_scale, 2)


def test_scale_by_a_vector_is_refused(build: Any, refused: Any) -> None:
    q, k, v = qkv(build)
    q = build.op("Mul", q, build.weight("w", 8))
    refused(build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION)), fold_query_scale)


def test_scaled_queries_with_another_user_are_refused(build: Any, refused: Any) -> None:
    q, k, v = qkv(build)
    q = build.op("Mul", q, build.constant(0.25))
    out = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
    refused(build.model(build.op("Add", out, q)), fold_query_scale)

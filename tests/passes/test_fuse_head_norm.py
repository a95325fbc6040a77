"""passes/fuse_head_norm.py"""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.passes.fuse_head_norm import fuse_head_norm
from llmc.passes.insert_kv_cache import insert_kv_cache

H, KH, D = 4, 2, 8
ATTENTION = {"num_heads": H, "kv_num_heads": KH, "scale": 0.4, "softcap": 0.0, "window": 0, "layer": 0}


def head_norm(build: Any, x: Any, heads: int, name: str, dim: int = D, epsilon: float = 1e-5) -> Any:
    headed = build.op("Reshape", x, build.constant([-1, heads, dim]))
    normed = build.op("RMSNormalization", headed, build.weight(name, dim), axis=-1, epsilon=epsilon)
    return build.op("Reshape", normed, build.constant([-1, heads * dim]))


def rotary(build: Any, x: Any, heads: int, angles: Any, dim: int) -> Any:
    return build.op("llmc.Rotary", x, *angles, num_heads=heads, rotary_dim=dim, interleaved=0)


def layer(build: Any, norm_q: Any = head_norm, norm_k: Any = head_norm, rotary_dim: int = 0, **settings: Any) -> Any:
    """Attention over pages, its queries and keys made by two functions of (build, x, heads, weight)."""
    build.token_inputs()
    heads, kv_heads = settings.get("num_heads", H), settings.get("kv_num_heads", KH)
    sizes = [heads * D, kv_heads * D, kv_heads * D]
    x = build.op("Split", build.input("x", "M", sum(sizes)), build.constant(sizes), axis=1, n_results=3)
    q, k = norm_q(build, x[0], heads, "q_norm"), norm_k(build, x[1], kv_heads, "k_norm")
    if rotary_dim:
        angles = [build.input(name, "M", rotary_dim // 2) for name in ("cos", "sin")]
        q, k = rotary(build, q, heads, angles, rotary_dim), rotary(build, k, kv_heads, angles, rotary_dim)
    model = build.model(build.op("llmc.CausalAttention", q, k, x[2], **ATTENTION | settings))
    assert insert_kv_cache(model) == 1
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "turned": {"rotary_dim": D},
    "partly turned, window": {"rotary_dim": D // 2, "window": 5},
    "one key head": {"kv_num_heads": 1, "rotary_dim": D},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_attention_takes_the_norms_of_its_heads(build: Any, check: Any, kind: str) -> None:
    check(layer(build, **SETTINGS[kind]), fuse_head_norm, 1)


def test_a_single_key_head_needs_no_reshape(build: Any, check: Any) -> None:
    def flat(build: Any, x: Any, heads: int, name: str) -> Any:
        return build.op("RMSNormalization", x, build.weight(name, D), axis=-1, epsilon=1e-5)

    check(layer(build, norm_k=flat, kv_num_heads=1), fuse_head_norm, 1)


def test_what_is_packed_in_no_row_is_packed_before_attention(build: Any, check: Any) -> None:
    build.token_inputs()
    q, k, v = (build.input(name, "M", n * D) for name, n in (("q", H), ("k", KH), ("v", KH)))
    q, k = head_norm(build, q, H, "q_norm"), head_norm(build, k, KH, "k_norm")
    model = build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION))
    insert_kv_cache(model)
    check(model, fuse_head_norm, 1)


def test_values_that_are_normalised_too(build: Any, check: Any) -> None:
    """Without a weight, which is one of ones; here keys are values, as in Gemma 4."""
    build.token_inputs()
    x = build.input("x", "M", (H + KH) * D)
    q, k = build.op("Split", x, build.constant([H * D, KH * D]), axis=1, n_results=2)
    v = build.op("Reshape", k, build.constant([-1, KH, D]))
    v = build.op("RMSNormalization", v, build.constant(ir.tensor(np.ones(D, np.float32))), axis=-1, epsilon=1e-5)
    v = build.op("Reshape", v, build.constant([-1, KH * D]))
    q, k = head_norm(build, q, H, "q_norm"), head_norm(build, k, KH, "k_norm")
    model = build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION))
    insert_kv_cache(model)
    check(model, fuse_head_norm, 1)


@pytest.mark.parametrize("rotary_dim", [0, D])
def test_queries_of_a_shared_cache(build: Any, check: Any, rotary_dim: int) -> None:
    build.token_inputs()
    x = build.input("x", "M", (H + 2 * KH) * D)
    q, k, v = build.op("Split", x, build.constant([H * D, KH * D, KH * D]), axis=1, n_results=3)
    own = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
    again = head_norm(build, own, H, "q_norm")
    if rotary_dim:
        again = rotary(
            build, again, H, [build.input(name, "M", rotary_dim // 2) for name in ("cos", "sin")], rotary_dim
        )
    model = build.model(build.op("llmc.CausalAttention", again, k, v, **ATTENTION))
    insert_kv_cache(model)
    check(model, fuse_head_norm, 1)


def whole_norm(build: Any, x: Any, heads: int, name: str, epsilon: float = 1e-5) -> Any:
    return build.op("RMSNormalization", x, build.weight(name, heads * D), axis=-1, epsilon=epsilon)


def layer_norm(build: Any, x: Any, heads: int, name: str) -> Any:
    headed = build.op("Reshape", x, build.constant([-1, heads, D]))
    normed = build.op("LayerNormalization", headed, build.weight(name, D), axis=-1, epsilon=1e-5)
    return build.op("Reshape", normed, build.constant([-1, heads * D]))


def no_norm(build: Any, x: Any, heads: int, name: str) -> Any:
    return x


def half_norm(build: Any, x: Any, heads: int, name: str) -> Any:
    return head_norm(build, x, 2 * heads, name, D // 2)


REFUSED: dict[str, Any] = {
    "a norm of the whole width": (whole_norm, whole_norm),
    "another norm": (layer_norm, layer_norm),
    "no norm of keys": (head_norm, no_norm),
    "no norm of queries": (no_norm, head_norm),
    "half a head": (half_norm, half_norm),
    "two epsilons": (head_norm, partial(head_norm, epsilon=1e-6)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_norms_are_refused(build: Any, refused: Any, kind: str) -> None:
    refused(layer(build, *REFUSED[kind]), fuse_head_norm)


def test_a_norm_with_another_user_is_refused(build: Any, refused: Any) -> None:
    model = layer(build)
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    norm.outputs[0].name = "seen"
    model.graph.outputs.append(norm.outputs[0])
    refused(model, fuse_head_norm)


def test_layers_are_taken_together(build: Any) -> None:
    build.token_inputs()
    x = build.input("x", "M", (H + 2 * KH) * D)
    for number in range(2):
        q, k, v = build.op("Split", x, build.constant([H * D, KH * D, KH * D]), axis=1, n_results=3)
        q, k = head_norm(build, q, H, f"q{number}"), head_norm(build, k, KH, f"k{number}")
        out = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
        x = build.op("Concat", out, out, axis=1)
    model = build.model(out)
    insert_kv_cache(model)
    assert fuse_head_norm(model) == 2
    assert graph.count_ops(model)["llmc.RMSNormPagedAttention"] == 2
    assert graph.count_ops(model).keys() == {"llmc.RMSNormPagedAttention", "Concat"}

"""passes/form_latent.py"""

from __future__ import annotations

from typing import Any

import pytest

from llmc.passes.form_latent import form_latent

H, N, RD, DV, L = 2, 6, 4, 5, 8
END = 2**63 - 1


def turned(build: Any, x: Any, heads: int, angles: Any, sorts: bool, interleaved: int = 0) -> Any:
    """The last part of each head [M, heads, RD]; its pairs put into halves before, as DeepSeek does it."""
    if sorts:
        bounds = [[build.constant([n]) for n in (start, END, 2, 2)] for start in (0, 1)]
        x = build.op("Concat", *(build.op("Slice", x, *bound) for bound in bounds), axis=-1)
    rows = build.op("Reshape", x, build.constant([-1, heads * RD]))
    turned = build.op("llmc.Rotary", rows, *angles, num_heads=heads, rotary_dim=RD, interleaved=interleaved)
    return build.op("Reshape", turned, build.constant([-1, heads, RD]))


def attention(
    build: Any,
    sorts: tuple[bool, bool] = (True, True),
    norm: bool = True,
    bias: bool = False,
    interleaved: tuple[int, int] = (0, 0),
) -> Any:
    x = build.input("x", "M", 7)
    angles = [build.input(name, "M", RD // 2) for name in ("cos", "sin")]
    q = build.op("llmc.Linear", x, build.weight("q", H * (N + RD), 7))
    q, q_end = split(build, build.op("Reshape", q, build.constant([-1, H, N + RD])), N, RD)
    latent, k_end = split(build, build.op("llmc.Linear", x, build.weight("kv_a", L + RD, 7)), L, RD)
    if norm:
        latent = build.op("RMSNormalization", latent, build.weight("norm", L), axis=-1, epsilon=1e-6)
    expand = [build.weight("kv_b", H * (N + DV), L), *[build.weight("kv_b.bias", H * (N + DV))] * bias]
    kv = build.op("llmc.LinearBias" if bias else "llmc.Linear", latent, *expand)
    k, v = split(build, build.op("Reshape", kv, build.constant([-1, H, N + DV])), N, DV)
    k_end = build.op("Reshape", k_end, build.constant([-1, 1, RD]))
    how = list(zip(sorts, interleaved, strict=True))
    ends = turned(build, q_end, H, angles, *how[0]), turned(build, k_end, 1, angles, *how[1])
    spread = build.op("Expand", ends[1], build.constant([1, H, RD]))
    heads = [build.op("Concat", *pair, axis=-1) for pair in ((q, ends[0]), (k, spread))]
    sizes = {"num_heads": H, "kv_num_heads": H, "scale": 0.3, "softcap": 0.0, "window": 0, "layer": 0}
    rows = [
        build.op("Reshape", value, build.constant([-1, size]))
        for value, size in ((v, H * DV), *((h, H * (N + RD)) for h in heads))
    ]
    return build.model(build.op("llmc.CausalAttention", rows[1], rows[2], rows[0], **sizes))


def split(build: Any, x: Any, *sizes: int) -> Any:
    return build.op("Split", x, build.constant(list(sizes)), axis=-1, n_results=2)


@pytest.mark.parametrize("sorts", [True, False])
def test_keys_and_values_of_heads_are_never_made(build: Any, check: Any, sorts: bool) -> None:
    check(attention(build, (sorts, sorts)), form_latent, 1)


def unturned(build: Any) -> Any:
    """As Kimi Linear's, which has no rotary."""
    build.token_inputs()
    x = build.input("x", "M", 7)
    q = build.op("llmc.Linear", x, build.weight("q", H * (N + RD), 7))
    latent, k_end = split(build, build.op("llmc.Linear", x, build.weight("kv_a", L + RD, 7)), L, RD)
    latent = build.op("RMSNormalization", latent, build.weight("norm", L), axis=-1, epsilon=1e-6)
    kv = build.op("llmc.Linear", latent, build.weight("kv_b", H * (N + DV), L))
    k, v = split(build, build.op("Reshape", kv, build.constant([-1, H, N + DV])), N, DV)
    k_end = build.op("Expand", build.op("Reshape", k_end, build.constant([-1, 1, RD])), build.constant([1, H, RD]))
    k = build.op("Reshape", build.op("Concat", k, k_end, axis=-1), build.constant([-1, H * (N + RD)]))
    v = build.op("Reshape", v, build.constant([-1, H * DV]))
    sizes = {"num_heads": H, "kv_num_heads": H, "scale": 0.3, "softcap": 0.0, "window": 0, "layer": 0}
    return build.model(build.op("llmc.CausalAttention", q, k, v, **sizes))


def test_queries_and_keys_that_are_not_turned_are_turned_by_no_angle(build: Any, check: Any) -> None:
    check(unturned(build), form_latent, 1)


@pytest.mark.parametrize("in_place", [0, 1])
def test_queries_and_keys_that_are_turned_differently_are_refused(build: Any, refused: Any, in_place: int) -> None:
    refused(attention(build, (True, False), interleaved=(0, in_place)), form_latent)


def test_pairs_turned_in_place_stay_pairs(build: Any) -> None:
    model = attention(build, (False, False), interleaved=(1, 1))
    assert form_latent(model) == 1
    (node,) = (node for node in model.graph if node.op_type == "CausalLatentAttention")
    assert node.attributes["interleaved"].as_int() == 1


def test_a_latent_that_is_not_normalised_is_refused(build: Any, refused: Any) -> None:
    refused(attention(build, norm=False), form_latent)


def test_biases_of_the_product_that_expands_it_are_refused(build: Any, refused: Any) -> None:
    refused(attention(build, bias=True), form_latent)

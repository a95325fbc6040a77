"""passes/insert_kv_cache.py"""

import itertools
from typing import Any

import numpy as np
import pytest

from llmc.compiler import graph
from llmc.passes.insert_kv_cache import insert_kv_cache

H, KH, D, LENGTH = 4, 2, 8, 70
ATTENTION = {"num_heads": H, "kv_num_heads": KH, "scale": 0.4, "softcap": 0.0, "window": 0, "layer": 0}


def qkv(build: Any) -> Any:
    x = build.input("x", "M", (H + 2 * KH) * D)
    return build.op("Split", x, build.constant([H * D, KH * D, KH * D]), axis=1, n_results=3)


def rotary(build: Any, x: Any, heads: Any, cos: Any, sin: Any, dim: Any = D) -> Any:
    return build.op("llmc.Rotary", x, cos, sin, num_heads=heads, rotary_dim=dim, interleaved=0)


def packed_model(build: Any, **attributes: Any) -> Any:
    build.token_inputs()
    q, k, v = qkv(build)
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes))


def rotary_model(build: Any, **attributes: Any) -> Any:
    build.token_inputs()
    q, k, v = qkv(build)
    angles = [build.op("Gather", build.weight(name, LENGTH, D // 2), build.inputs[1]) for name in ("cos", "sin")]
    q, k = rotary(build, q, H, *angles), rotary(build, k, KH, *angles)
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes))


def sinks_model(build: Any, **attributes: Any) -> Any:
    build.token_inputs()
    q, k, v = qkv(build)
    sinks = build.weight("sinks", H)
    return build.model(build.op("llmc.SinkCausalAttention", q, k, v, sinks, **ATTENTION | attributes))


def alibi_model(build: Any, **attributes: Any) -> Any:
    build.token_inputs()
    slopes = build.weight("slopes", H)
    return build.model(build.op("llmc.AlibiCausalAttention", *qkv(build), slopes, **ATTENTION | attributes))


def separate_model(build: Any, **attributes: Any) -> Any:
    """Queries and keys with a norm of their own, as Qwen 3 has them, come apart."""
    build.token_inputs()
    q, k, v = qkv(build)
    k = build.op("RMSNormalization", k, build.weight("k_norm", KH * D), axis=-1)
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes))


def turned_apart_model(build: Any, **attributes: Any) -> Any:
    build.token_inputs()
    q, k, v = qkv(build)
    names = ("cos", "sin", "cos_k", "sin_k")
    a, b, c, d = (build.op("Gather", build.weight(name, LENGTH, D // 2), build.inputs[1]) for name in names)
    q, k = rotary(build, q, H, a, b), rotary(build, k, KH, c, d)
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes))


def sliced_model(build: Any, **attributes: Any) -> Any:
    """Phi 3 cuts queries, keys and values with Slice."""
    build.token_inputs()
    x = build.input("x", "M", (H + 2 * KH) * D)
    cuts = [0, H * D, (H + KH) * D, (H + 2 * KH) * D]
    bounds = itertools.pairwise(cuts)
    parts = [build.op("Slice", x, *(build.constant([n]) for n in (start, stop, 1, 1))) for start, stop in bounds]
    return build.model(build.op("llmc.CausalAttention", *parts, **ATTENTION | attributes))


def shared_model(build: Any, **attributes: Any) -> Any:
    """Gemma 3n's last layers attend the keys and values of an earlier one, here with sinks too."""
    build.token_inputs()
    q, k, v = qkv(build)
    angles = [build.op("Gather", build.weight(name, LENGTH, D // 2), build.inputs[1]) for name in ("cos", "sin")]
    q, k = rotary(build, q, H, *angles), rotary(build, k, KH, *angles)
    first = build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes)
    again, heads = rotary(build, first, H, *angles), build.constant([-1, KH, D])
    v = build.op("Reshape", build.op("Reshape", v, heads), build.constant([-1, KH * D]))
    second = build.op("llmc.CausalAttention", again, k, v, **ATTENTION | {"window": 5})
    return build.model(build.op("llmc.SinkCausalAttention", second, k, v, build.weight("sinks", H), **ATTENTION))


def other_values_model(build: Any, **attributes: Any) -> Any:
    """MiMo V2 has values of fewer elements than keys."""
    build.token_inputs()
    x = build.input("x", "M", (H + KH) * D + KH * 5)
    q, k, v = build.op("Split", x, build.constant([H * D, KH * D, KH * 5]), axis=1, n_results=3)
    return build.model(build.op("llmc.CausalAttention", q, k, v, **ATTENTION | attributes))


MODELS = {
    "packed": packed_model,
    "rotary": rotary_model,
    "separate": separate_model,
    "turned_apart": turned_apart_model,
    "sliced": sliced_model,
    "sinks": sinks_model,
    "alibi": alibi_model,
    "shared": shared_model,
    "other_values": other_values_model,
}
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"window": 5}, "softcap": {"softcap": 2.0}}


class Cache:
    """Pages filled with numbers that must not matter, and one sequence's pages in no order."""

    def __init__(self, model: Any) -> None:
        self.run = graph.runner(model)
        random = np.random.default_rng(3)
        shapes = {str(v.name): tuple(v.shape[1:]) for v in model.graph.inputs if str(v.name)[1:].startswith("_cache")}
        self.caches = {name: random.normal(size=(5, *shape)).astype(np.float32) for name, shape in shapes.items()}
        self.pages = np.array([3, 1])

    def step(self, x: Any, positions: Any) -> Any:
        n = len(positions)
        feeds = {"tokens": np.zeros(n, np.int64), "positions": positions, "page_table": np.tile(self.pages, (n, 1))}
        results = self.run(feeds | self.caches | {"x": x})
        self.caches = {name: results[f"{name}_out"] for name in self.caches}
        return results["logits"]


def whole_and_paged(model: Any) -> Any:
    width = model.graph.inputs[2].shape[1]
    x = np.random.default_rng(4).normal(size=(LENGTH, width)).astype(np.float32)
    feeds: dict[str, Any] = {"tokens": np.zeros(LENGTH, np.int64), "positions": np.arange(LENGTH), "x": x}
    wanted = graph.evaluate(model, feeds)["logits"]
    n_layers = sum(node.op_type.endswith("CausalAttention") for node in model.graph)
    assert insert_kv_cache(model) == n_layers
    return x, wanted, Cache(model)


@pytest.mark.parametrize("kind", MODELS)
def test_attention_reads_and_extends_a_cache(build: Any, golden: Any, kind: Any) -> None:
    model = MODELS[kind](build)
    before = graph.to_text(model)
    x, wanted, cache = whole_and_paged(model)
    after = graph.to_text(model)
    golden(f"{before}\n\n// insert_kv_cache\n\n{after}")
    assert insert_kv_cache(model) == 0
    assert graph.to_text(model) == after
    np.testing.assert_allclose(cache.step(x, np.arange(LENGTH)), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", ["packed", "rotary"])
def test_token_by_token_gives_what_the_whole_sequence_gives(build: Any, kind: Any, settings: Any) -> None:
    x, wanted, cache = whole_and_paged(MODELS[kind](build, **SETTINGS[settings]))
    found = np.concatenate([cache.step(x[i : i + 1], np.array([i])) for i in range(LENGTH)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_chunks_of_any_size_give_what_the_whole_sequence_gives(build: Any) -> None:
    x, wanted, cache = whole_and_paged(rotary_model(build))
    bounds = [0, 1, 63, 66, LENGTH]
    chunks = [np.arange(start, stop) for start, stop in itertools.pairwise(bounds)]
    found = np.concatenate([cache.step(x[chunk], chunk) for chunk in chunks])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_sequences_in_one_step_do_not_see_each_other(build: Any) -> None:
    model = packed_model(build)
    x, wanted, cache = whole_and_paged(model)
    positions = np.array([0, 0, 1, 1, 2])
    table = np.array([[3, 1], [0, 2], [3, 1], [0, 2], [3, 1]])
    feeds: dict[str, Any] = {"tokens": np.zeros(5, np.int64), "positions": positions, "page_table": table}
    other = np.random.default_rng(5).normal(size=(2, x.shape[1])).astype(np.float32)
    rows = np.stack([x[0], other[0], x[1], other[1], x[2]])
    found = cache.run(feeds | cache.caches | {"x": rows})["logits"]
    np.testing.assert_allclose(found[[0, 2, 4]], wanted[:3], rtol=0, atol=2e-6)
    assert not np.allclose(found[[1, 3]], wanted[:2], atol=1e-3)


def test_padding_rows_write_nothing_and_give_zeros(build: Any) -> None:
    x, _, cache = whole_and_paged(rotary_model(build))
    before = cache.caches
    found = cache.step(x[:3], np.array([0, -1, -1]))
    assert found[0].any()
    assert not found[1:].any()
    for name, pages in cache.caches.items():
        changed = (pages != before[name]).any(axis=(1, 3))
        assert np.argwhere(changed).tolist() == [[3, 0]]


def test_layers_are_numbered_in_order(build: Any) -> None:
    build.token_inputs()
    q, k, v = qkv(build)
    one = build.op("llmc.CausalAttention", q, k, v, **ATTENTION | {"layer": 7})
    k, v = (build.op("Relu", each) for each in (k, v))
    two = build.op("llmc.CausalAttention", one, k, v, **ATTENTION | {"layer": 9})
    model = build.model(two)
    assert insert_kv_cache(model) == 2
    assert [node.attributes["layer"].as_int() for node in model.graph if node.domain == "llmc"] == [0, 1]
    assert [value.name for value in model.graph.outputs] == [
        "logits",
        *(f"{kind}_cache.{layer}_out" for layer in range(2) for kind in "kv"),
    ]


@pytest.mark.parametrize("window", [0, 5, "biases"])
def test_a_text_is_attended_whole_beside_others(build: Any, golden: Any, window: int | str) -> None:
    build.token_inputs()
    q, k, v = qkv(build)
    if window == "biases":
        biases = build.weight("biases", H, 2 * 128)
        attended = build.op("llmc.DistanceBidirectionalAttention", q, k, v, biases, **ATTENTION)
        attended_whole(build.model(attended), golden)
        return
    angles = [build.op("Gather", build.weight(name, LENGTH, D // 2), build.inputs[1]) for name in ("cos", "sin")]
    q, k = rotary(build, q, H, *angles), rotary(build, k, KH, *angles)
    attended = build.op("llmc.BidirectionalAttention", q, k, v, **ATTENTION | {"window": window})
    attended_whole(build.model(attended), golden)


def attended_whole(model: Any, golden: Any) -> None:
    """Texts beside each other are what each is alone."""
    lengths = (LENGTH, 3, 20)
    rows = [np.random.default_rng(n).normal(size=(n, (H + 2 * KH) * D)).astype(np.float32) for n in lengths]
    run = graph.runner(model)
    alone = [
        run({"tokens": np.zeros(len(x), np.int64), "positions": np.arange(len(x)), "x": x})["logits"] for x in rows
    ]
    assert insert_kv_cache(model) == 1
    golden(graph.to_text(model))
    assert insert_kv_cache(model) == 0
    pages = [[3, 1], [0, -1], [2, -1]]
    together: dict[str, Any] = {
        "tokens": np.zeros(sum(lengths) + 1, np.int64),
        "positions": np.concatenate([*map(np.arange, lengths), [-1]]),
        "page_table": np.concatenate([*([page] * n for page, n in zip(pages, lengths, strict=True)), [[-1, -1]]]),
        "x": np.concatenate([*rows, rows[0][:1]]),
    }
    for value in model.graph.inputs[-2:]:
        together[str(value.name)] = np.full((5, KH, 64, D), 7, np.float32)
    found = graph.evaluate(model, together)["logits"]
    np.testing.assert_allclose(found[:-1], np.concatenate(alone), rtol=0, atol=2e-6)
    assert not found[-1].any()


def latent_model(build: Any) -> Any:
    build.token_inputs()
    sizes = {"num_heads": H, "head_dim": 10, "latent_dim": D, "rotary_dim": 4, "interleaved": 1, "epsilon": 1e-6}
    rest = {"scale": 0.4, "softcap": 0.0, "window": 0, "layer": 0}
    shapes = {"q": H * 10, "absorbed": H * D, "kv": D + 4}
    q, absorbed, kv = (build.input(name, "M", width) for name, width in shapes.items())
    angles = [build.op("Gather", build.weight(name, LENGTH, 2), build.inputs[1]) for name in ("cos", "sin")]
    operands = [q, absorbed, kv, build.weight("norm", D), *angles]
    return build.model(build.op("llmc.CausalLatentAttention", *operands, **sizes, **rest))


def test_of_latents_and_what_is_turned_each_has_a_cache(build: Any, golden: Any) -> None:
    model = latent_model(build)
    feeds = {"positions": np.arange(LENGTH), "page_table": np.tile([3, 1], (LENGTH, 1)), "tokens": np.arange(LENGTH)}
    random = np.random.default_rng(1)
    for value in model.graph.inputs[2:]:
        feeds[str(value.name)] = random.normal(size=(LENGTH, value.shape[1])).astype(np.float32)
    wanted = graph.evaluate(model, {k: v for k, v in feeds.items() if k != "page_table"})["logits"]
    assert insert_kv_cache(model) == 1
    golden(graph.to_text(model))
    for value in model.graph.inputs[-2:]:
        feeds[str(value.name)] = np.full((5, 1, 64, value.shape[3]), 7, np.float32)
    found = graph.evaluate(model, feeds)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert insert_kv_cache(model) == 0


def test_keys_shared_under_biases_by_distance_are_kept_again(build: Any) -> None:
    build.token_inputs()
    q, k, v = qkv(build)
    one = build.op("llmc.CausalAttention", q, k, v, **ATTENTION)
    model = build.model(build.op("llmc.AlibiCausalAttention", one, k, v, build.weight("slopes", H), **ATTENTION))
    assert insert_kv_cache(model) == 2
    assert [node.attributes["layer"].as_int() for node in model.graph if node.domain == "llmc"] == [0, 1]

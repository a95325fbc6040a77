"""compiler/ops: every operator's definition runs, in two engines, and says what its equation says."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from llmc.compiler import graph, ops
from llmc.compiler.graph.run import with_functions
from llmc.compiler.graph.shapes import infer

Array: TypeAlias = np.ndarray[Any, Any]

M, N, K, H, KH, D, P, N_PAGES, R = 6, 8, 16, 4, 2, 16, 2, 5, 2
SHAPES: dict[str, tuple[int, ...]] = {
    "x": (M, K),
    "residual": (M, N),
    "bias": (N,),
    "q": (M, H * D),
    "queries": (M, H * D),
    "k": (M, KH * D),
    "v": (M, KH * D),
    "qkv": (M, (H + 2 * KH) * D),
    "query_norm": (D,),
    "key_norm": (D,),
    "cos": (M, 4),
    "sin": (M, 4),
    "positions": (M,),
    "rows": (R,),
    "page_table": (M, P),
    "k_cache": (N_PAGES, KH, 64, D),
    "index": (M, 2),
    "share": (M, 2),
    "gate_up": (3, 2 * N, K),
    "down": (3, K, N),
    "gate_up_bias": (3, 2 * N),
    "down_bias": (3, K),
    "sinks": (H,),
    "slopes": (H,),
    "biases": (H, 2 * 2 * 64),
    "v_cache": (N_PAGES, KH, 64, D),
    "scores": (M, N),
    "z": (M, K),
    "absorbed": (M, H * 12),
    "kv": (M, 12 + 8),
    "norm": (12,),
    "g": (M, H),
    "beta": (M, H),
    "slots": (M,),
    "y": (M, N),
    "adapters": (M,),
    "sizes": (2,),
    "is_given": (M,),
    "sees": (M,),
    "given": (M, K),
    "table": (9, 5),
    "turns": (M, 3),
    "a": (2, 2 * 3, K),
    "b": (2, N, 3),
    **{f"table_{i}": (P, K) for i in range(ops.MOST_TABLES)} | {f"index_{i}": (M,) for i in range(ops.MOST_TABLES)},
}
SETTINGS: dict[str, Any] = {
    "num_heads": H,
    "kv_num_heads": KH,
    "head_dim": D,
    "scale": 0.3,
    "softcap": 5.0,
    "window": 3,
    "layer": 1,
    "rotary_dim": 8,
    "interleaved": 0,
    "epsilon": 1e-5,
    "num_groups": 4,
    "kept": 2,
    "best": 2,
    "fill": -1.0,
    "alpha": 1.7,
    "limit": 2.0,
    "offset": 1.0,
    "latent_dim": 12,
    "k": 3,
    "least": 1e-3,
    "silu": 1,
    "num_k_heads": KH,
    "num_v_heads": H,
    "key_dim": D,
    "value_dim": 6,
    "place": 0,
    "part": 1,
    "directions": [0, 0, 2, 1, 0],
}
POSITIONS = np.array([62, 63, 64, 65, -1, 3])
PAGE_TABLE = np.array([[3, 1]] * 5 + [[2, -1]])
SLOTS = np.array([1, 1, 1, 0, -1, 2])
SEES = np.array([62, 65, 65, 65, -1, 4])
TURNS = np.array([[0, 0, 0], [1, 1, 1], [2, 3, 2], [2, 2, 4], [8, 8, 8], [0, 0, 0]])
ADAPTERS = np.array([1, -1, 0, 0, 1, -1])
CHOSEN = np.array([[0, 2], [2, 0], [2, 0], [0, 2], [2, 0], [0, 2]])


def shape_of(op: str, name: str) -> tuple[int, ...]:
    if appended := ops.appended_parts(op):
        widths = {"weight": ((H + 2 * KH) * D, K), "bias": ((H + 2 * KH) * D,)}
        return widths.get(name) or (SHAPES[name] if name in SHAPES else shape_of(appended[0], name))
    if op in ("SinkAttention", "AlibiAttention", "DistanceAttention") and name in "qkv":
        return (3, H if name == "q" else KH, M, D)
    if "Latent" in op and name in ("q", "k_cache", "v_cache"):
        return {"q": (M, H * D), "k_cache": (N_PAGES, 1, 64, 8), "v_cache": (N_PAGES, 1, 64, 12)}[name]
    if op in ops.STATEFUL or op in ops.WITH_STATES:
        return shape_with_state(op, name)
    if op in ("TakeFirst", "AddGiven") and name == "given":
        return (M, 3 * K)
    if op == "HeadProduct":
        return {"x": (M, H * D), "weight": (H, N, 12)}[name]
    if op.startswith("Experts") and name == "residual":
        return (M, K)
    if op in ops.ROUTERS:
        return (M, N) if name == "x" else (N,)
    if op in ops.LOW_RANKS and ops.LOW_RANKS[op].strips and name in ("y", "b"):
        return {"y": (M, 2 * N), "b": (2, 2 * N, 3)}[name]
    op = ops.normed_parts(op)[1]
    if name in ("norm_weight", "norm_bias"):
        return (K,)
    if op == "QueryKeyRMSNorm" and name == "query_norm":
        return (H * D,)
    if op == "QueryKeyRMSNorm" and name == "key_norm":
        return (KH * D,)
    if name == "weight":
        return (K,) if "Norm" in op else (2 * N, K) if op.startswith(("Gated", "LinearStrips")) else (N, K)
    if name in ("bias", "residual") and "Norm" in op:
        return (K,) if name == "bias" else (M, K)
    if op.startswith(("Gated", "LinearStrips")) and name == "bias":
        return (2 * N,)
    return (M, H * D) if op == "Rotary" and name == "x" else SHAPES[name]


def shape_with_state(op: str, name: str) -> tuple[int, ...]:
    """M tokens, of two sequences where they are whole."""
    taps, value_dim, n_slots = 4, 6, 3
    if "Conv" in op:
        of_conv: dict[str, tuple[int, ...]] = {"weight": (N, taps), "bias": (N,), "state": (n_slots, taps - 1, N)}
        return of_conv.get(name) or ((M, N) if op in ops.STATEFUL else (M, 2, N) if name == "x" else SHAPES[name])
    if op.endswith(ops.SELECTIVE_SCAN):
        of_scan: dict[str, tuple[int, ...]] = {"rate": (N, value_dim), "state": (n_slots, N, value_dim)}
        of_scan |= {"bias": (N,), "skip": (N,)}
        each = (M,) if op in ops.STATEFUL else (M, 2)
        return of_scan.get(name) or (*each, value_dim if name in ("b", "c") else N)
    if op in ops.STATEFUL:
        of_rule: dict[str, tuple[int, ...]] = {"state": (n_slots, H, D, value_dim)}
        of_rule |= {"a": (M, H), "b": (M, H), "bias": (H,), "rate": (H,)}
        of_rule |= {"g": (M, H * D)} if ops.CHANNEL_DELTA in op else {}
        return (M, 2 * KH * D + H * value_dim) if name == "qkv" else of_rule.get(name) or SHAPES[name]
    if name == "g" and ops.CHANNEL_DELTA in op:
        return (M, 2, H, D)
    return (M, 2, H) if name in ("g", "beta") else (M, 2, H, value_dim) if name == "v" else (M, 2, KH, D)


def deferred_inputs(op: str) -> dict[str, Array]:
    """Of products beside a norm that is deferred: what one hands the other belongs together."""
    random = np.random.default_rng(0)
    n, k = (64, K) if op.endswith("Moments") else ((H + 2 * KH) * D if ops.appended_parts(op) else N, 128)
    rows, normed = (2 * n if "Gated" in op or "Strips" in op else n), n if op.endswith("Moments") else k
    shapes = {"x": (M, k), "weight": (rows, k), "bias": (rows,), "residual": (M, n)}
    shapes |= {"norm_weight": (normed,), "norm_bias": (normed,)}
    drawn = {name: random.normal(0.5, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    x, weight, norm_weight, norm_bias = (drawn[name] for name in ("x", "weight", "norm_weight", "norm_bias"))
    if not op.endswith("Moments"):
        shift = weight @ norm_bias + drawn["bias"] * ("bias" in ops.OPERATORS[op].inputs)
        folded = np.stack([weight @ norm_weight, shift])
        drawn |= {"scaled": x * norm_weight, "moments": moments_of(x), "folded": folded}
    return {name: drawn[name] if name in drawn else step_input(name) for name in ops.OPERATORS[op].inputs}


def moments_of(y: Array, columns: int = 16) -> Array:
    """[N/16, M, 2]: the mean of each 16 columns, and the sum of squared differences from it."""
    parts = y.reshape(M, -1, columns)
    moments: Array = np.stack([parts.mean(-1), columns * parts.var(-1)], axis=-1).swapaxes(0, 1)
    return moments


def is_deferred(op: str) -> bool:
    return op.startswith("Deferred") or op.endswith("Moments")


def step_input(name: str) -> Array:
    """Of attention: positions, the page table, or anything of the shape of one of the others."""
    known = {"positions": POSITIONS, "page_table": PAGE_TABLE, "sees": SEES}
    return known[name] if name in known else np.random.default_rng(1).normal(size=SHAPES[name]).astype(np.float32)


def inputs_of(op: str) -> dict[str, Array]:
    if is_deferred(op):
        return deferred_inputs(op)
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {
        name: random.normal(size=shape_of(op, name)).astype(np.float32) for name in ops.OPERATORS[op].inputs
    }
    whole = {"positions": POSITIONS, "page_table": PAGE_TABLE, "index": CHOSEN, "slots": SLOTS}
    whole |= {"sees": SEES, "adapters": ADAPTERS, "turns": TURNS}
    whole |= {"sizes": np.array([N - 2, (2 * N if "Strips" in op else N) - (N - 2)])}
    if "rows" in feeds:  # of two texts, and a row that pads the step
        return feeds | {"positions": np.array([0, 1, 2, 0, 1, -1]), "rows": np.array([2, 4])}
    feeds |= {"g": -np.abs(feeds["g"])} if "g" in feeds else {}
    return (
        feeds | {n: v for n, v in whole.items() if n in feeds} | {n: np.arange(M) % P for n in feeds if "index_" in n}
    )


def model_of(op: str, feeds: dict[str, Array], **settings: Any) -> ir.Model:
    """A graph of one node; its results are r0, r1, …"""
    values = [
        ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype)))
        for n, a in feeds.items()
    ]
    wanted = {name: (SETTINGS | settings)[name] for name in ops.OPERATORS[op].attributes}
    attributes = [ir.convenience.convert_attribute(name, value) for name, value in wanted.items()]
    node = ir.Node("llmc", op, values, attributes, num_outputs=len(ops.OPERATORS[op].function.outputs))
    infer(node)
    for i, value in enumerate(node.outputs):
        value.name = f"r{i}"
    one = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": ops.OPSET, "llmc": ops.VERSION}, name=op)
    return ir.Model(one, ir_version=10)


def run(op: str, feeds: dict[str, Array], **settings: Any) -> list[Array]:
    return list(graph.evaluate(model_of(op, feeds, **settings), feeds).values())


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_definition_runs_in_both_engines_with_the_shapes_promised(op: str) -> None:
    feeds = inputs_of(op)
    model = model_of(op, feeds)
    proto = ir.to_proto(with_functions(model))
    onnx.checker.check_model(proto)
    found = list(graph.evaluate(model, feeds).values())
    reference = ReferenceEvaluator(proto).run(None, feeds)
    assert [a.shape for a in found] == [tuple(value.shape or ()) for value in model.graph.outputs]
    for a, b in zip(found, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * max(1.0, np.abs(b).max() / 4))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0),
    "Silu": lambda x: x / (1 + np.exp(-x)),
    "Gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "GeluTanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_its_equation(bias: bool, activation: str, residual: bool) -> None:
    op = ops.linear_name(bias, activation, residual)
    assert ops.linear_parts(op) == (bias, activation, residual)
    feeds = inputs_of(op)
    wanted = ACTIVATIONS[activation](feeds["x"] @ feeds["weight"].T + feeds.get("bias", 0)) + feeds.get("residual", 0)
    np.testing.assert_allclose(run(op, feeds)[0], wanted, rtol=0, atol=1e-5)


def test_there_are_twenty_linears_and_six_gated_ones() -> None:
    assert sum(ops.linear_parts(op) is not None for op in ops.OPERATORS) == 20
    assert sum(op.startswith("GatedLinear") for op in ops.OPERATORS) == 6


@pytest.mark.parametrize("bias", [False, True])
def test_gated_linear_takes_the_gate_from_the_first_rows(bias: bool) -> None:
    feeds = inputs_of(ops.gated_linear_name("Silu", bias))
    both = feeds["x"] @ feeds["weight"].T + feeds.get("bias", 0)
    wanted = ACTIVATIONS["Silu"](both[:, :N]) * both[:, N:]
    np.testing.assert_allclose(run(ops.gated_linear_name("Silu", bias), feeds)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("op", "activation"), ops.EXPERTS.items())
def test_experts_are_their_equation(op: str, activation: str) -> None:
    assert ops.experts_name(activation) == op
    feeds = inputs_of(op)
    wanted = np.zeros((M, K), np.float32)
    for m, experts in enumerate(CHOSEN):
        for share, expert in zip(feeds["share"][m], experts, strict=True):
            gate, up = np.split(feeds["gate_up"][expert] @ feeds["x"][m], 2)
            wanted[m] += share * (feeds["down"][expert] @ (ACTIVATIONS[activation](gate) * up))
    np.testing.assert_allclose(run(op, feeds)[0], wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("op", [op for op in ops.OPERATORS if op.startswith("Deferred")])
def test_a_deferred_norm_gives_what_the_norm_does(op: str) -> None:
    """Whatever the width of its parts."""
    feeds, plain = inputs_of(op), op.removeprefix("Deferred")
    wanted = run(plain, {name: feeds[name] for name in ops.OPERATORS[plain].inputs})
    for columns in (16, 64):
        found = run(op, feeds | {"moments": moments_of(feeds["x"], columns)})
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("columns", [16, 64])
@pytest.mark.parametrize("op", ["LinearResidual", "LinearBiasResidual"])
def test_a_norm_is_prepared_by_its_weight_and_moments(op: str, columns: int) -> None:
    feeds = inputs_of(ops.moments_name(op, columns))
    y, scaled, moments = run(ops.moments_name(op, columns), feeds)
    np.testing.assert_array_equal(y, run(op, {name: feeds[name] for name in ops.OPERATORS[op].inputs})[0])
    np.testing.assert_allclose(scaled, y * feeds["norm_weight"], rtol=1e-6)
    np.testing.assert_allclose(moments, moments_of(y, columns), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_turns_pairs_and_leaves_the_rest(interleaved: int) -> None:
    feeds = inputs_of("Rotary")
    x = feeds["x"].reshape(M, H, D)
    wanted = x.copy()
    a, b = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    cos, sin = feeds["cos"][:, None], feeds["sin"][:, None]
    wanted[..., a] = x[..., a] * cos - x[..., b] * sin
    wanted[..., b] = x[..., b] * cos + x[..., a] * sin
    found = run("Rotary", feeds, interleaved=interleaved)[0]
    np.testing.assert_allclose(found, wanted.reshape(M, H * D), rtol=0, atol=1e-6)


def test_angles_are_looked_up_each_in_its_direction() -> None:
    feeds, directions = inputs_of("GatherTurned"), SETTINGS["directions"]
    wanted = np.array([[feeds["table"][turns[d], c] for c, d in enumerate(directions)] for turns in TURNS])
    np.testing.assert_array_equal(run("GatherTurned", feeds)[0], wanted)


def test_rows_that_go_into_later_layers_are_several_side_by_side() -> None:
    feeds = inputs_of("AddGiven") | {"is_given": np.array([0, 1, 0, 0, 1, 1])}
    mark, x, given = feeds["is_given"][:, None] != 0, feeds["x"], feeds["given"]
    np.testing.assert_array_equal(run("TakeFirst", feeds)[0], np.where(mark, given[:, :K], x))
    for part in (1, 2):
        wanted = np.where(mark, x + given[:, part * K : (part + 1) * K], x)
        np.testing.assert_array_equal(run("AddGiven", feeds, part=part)[0], wanted)


def attended(query: Array, keys: Array, values: Array, scale: float, softcap: float) -> Array:
    """One query [D] over keys, values [L, D], in float64."""
    scores = keys.astype(np.float64) @ query * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    weights = np.exp(scores - scores.max())
    result: Array = weights @ values / weights.sum()
    return result


@pytest.mark.parametrize("window", [0, 3, -3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("ahead", [False, True])
def test_paged_attention_is_its_equation(window: int, softcap: float, ahead: bool) -> None:
    name = ops.paged_attention_name(False, False, ahead=ahead)
    feeds = inputs_of(name)
    out, k_cache, v_cache = run(name, feeds, window=window, softcap=softcap)
    q, k, v = np.split(feeds["qkv"], [H * D, (H + KH) * D], axis=1)
    wanted_k, wanted_v = feeds["k_cache"].copy(), feeds["v_cache"].copy()
    for m, position in enumerate(POSITIONS):
        if position >= 0:
            page, slot = PAGE_TABLE[m, position // 64], position % 64
            wanted_k[page, :, slot], wanted_v[page, :, slot] = k[m].reshape(KH, D), v[m].reshape(KH, D)
    assert np.array_equal(k_cache, wanted_k)
    assert np.array_equal(v_cache, wanted_v)
    for m, position in enumerate(POSITIONS):
        for head in range(H):
            found = out[m].reshape(H, D)[head]
            if position < 0:
                assert not found.any()
                continue
            first = max(0, position + 1 - window) if window > 0 else position // -window * -window if window else 0
            seen = range(first, (SEES[m] if ahead else position) + 1)
            places = [(PAGE_TABLE[m, j // 64], head // (H // KH), j % 64) for j in seen]
            keys, values = (np.stack([cache[place] for place in places]) for cache in (wanted_k, wanted_v))
            wanted = attended(q[m].reshape(H, D)[head], keys, values, SETTINGS["scale"], softcap)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_rotary_paged_attention_turns_queries_and_keys_first() -> None:
    feeds = inputs_of("RotaryPagedAttention")
    q, k, v = np.split(feeds["qkv"], [H * D, (H + KH) * D], axis=1)
    angles = {name: feeds[name] for name in ("cos", "sin")}
    q, k = (run("Rotary", {"x": x, **angles}, num_heads=x.shape[1] // D)[0] for x in (q, k))
    plain = {name: feeds[name] for name in ("positions", "page_table", "k_cache", "v_cache")}
    wanted = run("PagedAttention", {"qkv": np.concatenate([q, k, v], axis=1), **plain})
    for a, b in zip(run("RotaryPagedAttention", feeds), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_queries_and_keys_may_be_normalised_whole() -> None:
    feeds = inputs_of("QueryKeyRMSNorm")
    q, k, v = np.split(feeds["qkv"], [H * D, (H + KH) * D], axis=1)
    weights = feeds["query_norm"], feeds["key_norm"]
    q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w for x, w in zip((q, k), weights, strict=True))
    found = run("QueryKeyRMSNorm", feeds)[0]
    np.testing.assert_allclose(found, np.concatenate([q, k, v], axis=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("turned", ["", "Rotary"])
def test_normalised_heads_are_normalised_before_they_are_turned(turned: str) -> None:
    feeds = inputs_of(f"RMSNorm{turned}PagedAttention")
    q, k, v = np.split(feeds["qkv"].reshape(M, -1, D), [H, H + KH], axis=1)
    weights = feeds["query_norm"], feeds["key_norm"]
    q, k = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w for x, w in zip((q, k), weights, strict=True))
    rest = {name: array for name, array in feeds.items() if name not in ("query_norm", "key_norm")}
    plain = rest | {"qkv": np.concatenate([q, k, v], axis=1).reshape(M, -1)}
    for a, b in zip(run(f"RMSNorm{turned}PagedAttention", feeds), run(f"{turned}PagedAttention", plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


def test_causal_attention_is_its_equation() -> None:
    feeds = inputs_of("CausalAttention")
    found = run("CausalAttention", feeds)[0].reshape(M, H, D)
    q, k, v = (feeds[name].reshape(M, -1, D) for name in "qkv")
    for m in range(M):
        for head in range(H):
            seen = slice(max(0, m - 2), m + 1)
            keys, values = k[seen, head // 2], v[seen, head // 2]
            wanted = attended(q[m, head], keys, values, SETTINGS["scale"], 5.0)
            np.testing.assert_allclose(found[m, head], wanted, rtol=0, atol=2e-6)


def test_every_operator_says_its_equation_and_shapes() -> None:
    for name, operator in ops.OPERATORS.items():
        doc = operator.function.graph.doc_string or ""
        assert "[M" in doc or "[S" in doc or "any shape" in doc, name
        assert len(doc) > 30, name


@pytest.mark.parametrize("op", ops.POOLS)
def test_rows_of_a_step_are_pooled_as_their_text_is(op: str) -> None:
    feeds = inputs_of(f"{op}Rows")
    (found,) = run(f"{op}Rows", feeds)
    first, second = (run(op, {"x": feeds["x"][rows]})[0][-1] for rows in (slice(0, 3), slice(3, 5)))
    np.testing.assert_allclose(found, [first, second], rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [0, 2])
def test_texts_of_a_step_are_attended_whole_and_by_themselves(window: int) -> None:
    feeds = inputs_of("BidirectionalPagedAttention") | {"positions": np.array([0, 1, 2, 0, 1, -1])}
    feeds["page_table"] = np.array([[3, 1]] * 3 + [[2, -1]] * 3)
    found = run("BidirectionalPagedAttention", feeds, window=window)[0]
    q, k, v = np.split(feeds["qkv"], [H * D, (H + KH) * D], axis=1)
    for rows in (slice(0, 3), slice(3, 5)):
        alone = run("BidirectionalAttention", {"q": q[rows], "k": k[rows], "v": v[rows]}, window=window)[0]
        np.testing.assert_allclose(found[rows], alone, rtol=0, atol=1e-6)
    assert not found[-1].any()

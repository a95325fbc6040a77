"""passes/form_attention.py and compiler/graph/causal_mask.py"""

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.frontend.embedding import BOTH_WAYS
from llmc.compiler.graph import causal_mask
from llmc.passes.attention_bias import read_slopes
from llmc.passes.distance_bias import read_distances
from llmc.passes.form_attention import form_attention
from llmc.passes.resolve_shapes import resolve_shapes
from llmc.runtime.errors import LlmcError

run = partial(form_attention, n_context=64)
run.__name__ = "form_attention"  # type: ignore[attr-defined]
LOWEST = float(np.finfo(np.float32).min)


def qkv(build: Any, kv_heads: int = 4) -> list[Any]:
    build.sequence_inputs()
    return [
        build.input(name, "batch", n, "sequence", 8) for name, n in zip("qkv", (4, kv_heads, kv_heads), strict=True)
    ]


def places(build: Any) -> tuple[Any, Any]:
    """Where queries and keys are, [sequence, 1] and [sequence]."""
    zero, one = (build.constant(ir.tensor(np.array(number, np.int64))) for number in (0, 1))
    sequence = build.op("Squeeze", build.op("Shape", build.inputs[0], start=1, end=2))
    keys = build.op("Range", zero, sequence, one, shape=("sequence",))
    return build.op("Unsqueeze", keys, build.constant([1])), keys


def causal(build: Any, window: int | None = None) -> Any:
    """bool [sequence, sequence]"""
    queries, keys = places(build)
    seen = build.op("LessOrEqual", keys, queries)
    if window is None:
        return seen
    near = build.op("Less", build.op("Sub", queries, keys), build.constant(ir.tensor(np.array(window, np.int64))))
    return build.op("And", seen, near)


def added(build: Any, window: int | None = None) -> Any:
    return build.op("Where", causal(build, window), build.constant(0.0), build.constant(LOWEST))


def scores(build: Any, q: Any, k: Any) -> Any:
    return build.op("MatMul", q, build.op("Transpose", k, perm=[0, 1, 3, 2]))


def test_scores_that_are_scaled_and_masked(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Add", build.op("Mul", scores(build, q, k), build.constant(0.25)), added(build))
    check(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)), run, 1)


def test_grouped_heads_and_a_sliding_window(build: Any, golden: Any) -> None:
    q, k, v = qkv(build, 2)
    ends = build.op("Shape", q, start=0, end=1), build.op("Shape", q, start=2)
    sizes = build.op("Concat", ends[0], build.constant([2, 2]), ends[1], axis=0)
    for_all = []
    for value in (k, v):
        apart = build.op("Expand", build.op("Unsqueeze", value, build.constant([2])), sizes,
                         shape=("batch", 2, 2, "sequence", 8))  # fmt: skip
        for_all.append(build.op("Reshape", apart, build.constant([0, 4, -1, 8]), shape=("batch", 4, "sequence", 8)))
    x = build.op("Add", build.op("Div", scores(build, q, for_all[0]), build.constant(2.0)), added(build, 3))
    model = build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), for_all[1]))
    before = graph.to_text(model)
    assert run(model) == 1
    golden(f"{before}\n\n// form_attention\n\n{graph.to_text(model)}")
    attention = model.graph.outputs[0].producer()
    assert attention is not None
    assert attention.metadata_props["llmc.window"] == "3"


def test_scaled_queries_and_keys_and_a_guard_against_nan(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    q = build.op("Mul", q, build.constant(0.5))
    turned = build.op("Mul", build.op("Transpose", k, perm=[0, 1, 3, 2]), build.constant(0.5))
    x = build.op("Softmax", build.op("Add", build.op("MatMul", q, turned), added(build)), axis=-1)
    x = build.op("Where", build.op("IsNaN", x), build.constant(0.0), x)
    check(build.model(build.op("MatMul", x, v)), run, 1)


def test_a_softcap_and_a_mask_that_chooses(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Mul", scores(build, q, k), build.constant(0.25))
    x = build.op("Mul", build.op("Tanh", build.op("Div", x, build.constant(5.0))), build.constant(5.0))
    x = build.op("Where", causal(build), x, build.constant(LOWEST))
    check(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)), run, 1)


def test_a_softcap_that_holds_the_scale(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Tanh", build.op("Mul", scores(build, q, k), build.constant(0.05)))
    x = build.op("Add", build.op("Mul", x, build.constant(5.0)), added(build))
    check(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)), run, 1)


def sizes(build: Any, *parts: Any) -> Any:
    """A shape of numbers and of "batch" and "sequence"."""
    axes = {"batch": 0, "sequence": 1}
    joined = [build.op("Shape", build.inputs[0], start=axes[part], end=axes[part] + 1) if part in axes
              else build.constant([part]) for part in parts]  # fmt: skip
    return build.op("Concat", *joined, axis=0)


def merged(build: Any, x: Any, *sides: Any) -> Any:
    """[batch, 4, …] as [batch * 4, …]."""
    return build.op("Reshape", x, sizes(build, -1, *sides), shape=("batch*4", *sides))


def apart(build: Any, x: Any, *sides: Any) -> Any:
    """The other way round."""
    return build.op("Reshape", x, sizes(build, "batch", 4, *sides), shape=("batch", 4, *sides))


def test_heads_that_are_merged_with_the_batch(build: Any, check: Any) -> None:
    square = ("sequence", "sequence")
    q, k, v = (merged(build, x, "sequence", 8) for x in qkv(build))
    x = build.op("MatMul", q, build.op("Transpose", k, perm=[0, 2, 1]), shape=("batch*4", *square))
    x = build.op("Add", apart(build, x, *square), added(build))
    x = merged(build, build.op("Max", x, build.constant(LOWEST)), *square)
    x = merged(build, apart(build, build.op("Softmax", x, axis=-1), *square), *square)
    y = build.op("MatMul", x, v, shape=("batch*4", "sequence", 8))
    check(build.model(apart(build, y, "sequence", 8)), run, 1)


def test_a_node_with_a_mask_needs_none(build: Any, check: Any) -> None:
    q, k, v = qkv(build, 2)
    mask = build.op("Unsqueeze", causal(build), build.constant([0, 1]))
    check(build.model(build.op("Attention", q, k, v, mask, scale=0.5)), run, 1)


def test_a_node_that_is_causal_may_have_a_mask_that_hides_nothing(build: Any, check: Any) -> None:
    q, k, v = qkv(build)
    mask = build.op("Or", causal(build), build.op("Not", causal(build)))
    check(build.model(build.op("Attention", q, k, v, mask, is_causal=1)), run, 1)


@pytest.mark.parametrize(("window", "n_context"), [(None, 64), (40, 64), (40, 50)])
def test_a_mask_that_is_cut_from_a_table_is_read_whole(build: Any, window: int | None, n_context: int) -> None:
    q, k, v = qkv(build)
    distance = np.arange(64)[:, None] - np.arange(64)
    table = build.constant(ir.tensor((distance >= 0) & (distance < (window or 64))))
    n = build.op("Shape", build.inputs[0], start=1, end=2)
    ends = build.op("Concat", n, n, axis=0)
    mask = build.op("Slice", table, build.constant([0, 0]), ends, shape=("sequence", "sequence"))
    model = build.model(build.op("Attention", q, k, v, mask))
    assert form_attention(model, n_context=n_context) == 1
    attention = model.graph.outputs[0].producer()
    assert attention is not None
    assert attention.metadata_props["llmc.window"] == str(window or 0)


@pytest.mark.parametrize("n_context", [64, 30])
def test_chunks_are_told_from_windows(build: Any, n_context: int) -> None:
    q, k, v = qkv(build)
    chunk = build.constant(ir.tensor(np.array(12, np.int64)))
    queries, keys = places(build)
    same = build.op("Equal", build.op("Div", queries, chunk), build.op("Div", keys, chunk))
    mask = build.op("Where", build.op("And", causal(build), same), build.constant(0.0), build.constant(LOWEST))
    model = build.model(build.op("MatMul", build.op("Softmax", build.op("Add", scores(build, q, k), mask), axis=-1), v))
    assert form_attention(model, n_context=n_context) == 1
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.metadata_props["llmc.window"] == "-12"


def test_a_window_of_at_most_the_sequence_is_not_lost(build: Any) -> None:
    q, k, v = qkv(build)
    queries, keys = places(build)
    length = build.op("Squeeze", build.op("Shape", build.inputs[0], start=1, end=2))
    size = build.op("Min", length, build.constant(ir.tensor(np.array(40, np.int64))))
    near = build.op("Less", build.op("Sub", queries, keys), size)
    mask = build.op("And", near, build.op("LessOrEqual", keys, queries))
    model = build.model(build.op("Attention", q, k, v, mask))
    resolve_shapes(model, n_context=64)
    assert run(model) == 1
    attention = model.graph.outputs[0].producer()
    assert attention is not None
    assert attention.metadata_props["llmc.window"] == "40"


def test_packed_heads_are_told_apart(build: Any, check: Any) -> None:
    build.sequence_inputs()
    q, k, v = (build.input(name, "batch", "sequence", n) for name, n in zip("qkv", (32, 16, 16), strict=True))
    check(build.model(build.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=2, is_causal=1,
                               shape=("batch", "sequence", 32))), run, 1)  # fmt: skip


def test_an_attention_that_looks_ahead_is_refused(build: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Softmax", scores(build, q, k), axis=-1)
    with pytest.raises(LlmcError, match="not causal: all keys count"):
        run(build.model(build.op("MatMul", x, v)))


def test_a_bias_by_position_is_refused(build: Any) -> None:
    q, k, v = qkv(build)
    queries, keys = places(build)
    far = build.op("Cast", build.op("Sub", keys, queries), to=1)
    x = build.op("Add", build.op("Add", scores(build, q, k), far), added(build))
    with pytest.raises(LlmcError, match="ALiBi"):
        run(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)))


def alibi(build: Any) -> Any:
    """A bias [4, 1, keys] that goes with the distance, for each head by another slope."""
    _, keys = places(build)
    slopes = build.constant(ir.tensor(np.array([0.5, 0.25, 0.125, 0.0625], np.float32).reshape(4, 1, 1)))
    return build.op("Mul", build.op("Cast", keys, to=1), slopes)


def test_a_bias_by_position_has_a_slope_for_each_head(build: Any, check: Any) -> None:
    """As BLOOM has it, with heads that are merged with the batch; and scaled behind it, as Falcon does."""
    q, k, v = qkv(build)
    square = ("sequence", "sequence")
    x = build.op("Add", merged(build, scores(build, q, k), *square), alibi(build), shape=("batch*4", *square))
    x = build.op("Add", build.op("Mul", apart(build, x, *square), build.constant(0.25)), added(build))
    check(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)), run, 1)


def bucketed(
    build: Any, *, by_distance: bool = True, by_length: bool = False, perm: tuple[int, ...] = (2, 0, 1)
) -> Any:
    """A bias [1, 4, sequence, sequence] that is looked up: by how far the key is behind, at most 5, or in short texts
    less; or not by that."""
    queries, keys = places(build)
    apart = build.op("Sub" if by_distance else "Add", keys, queries)
    ends = [build.constant(ir.tensor(np.array(number, np.int64))) for number in (-5, 5)]
    most = ends[1]
    if by_length:
        length = build.op("Squeeze", build.op("Shape", build.inputs[0], start=1, end=2))
        most = build.op("Min", most, build.op("Div", length, ends[1]))
    bucket = build.op("Add", build.op("Min", build.op("Max", apart, ends[0]), most), ends[1])
    of_heads = build.op("Transpose", build.op("Gather", build.weight("table", 11, 4), bucket), perm=list(perm))
    return build.op("Unsqueeze", of_heads, build.constant([0]))


def encoder(build: Any, *more: Any, mask: Any = None) -> Any:
    """Attention of an encoder, with these added to its scores."""
    q, k, v = qkv(build) if not build.inputs else build.inputs[-3:]
    x = build.op("Mul", scores(build, q, k), build.constant(0.25))
    for each in more if mask is None else (*more, mask):
        x = build.op("Add", x, each)
    model = build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v))
    model.metadata_props[BOTH_WAYS] = "yes"
    return model


def test_a_bias_by_distance_of_an_encoder_is_a_table(build: Any, check: Any) -> None:
    qkv(build)
    check(encoder(build, bucketed(build)), run, 1)


def test_an_encoder_needs_no_bias_and_may_have_a_window(build: Any) -> None:
    qkv(build)
    queries, keys = places(build)
    far = build.op("Greater", build.op("Abs", build.op("Sub", keys, queries)), build.constant(ir.tensor(np.array(4))))
    model = encoder(build, mask=build.op("Where", far, build.constant(LOWEST), build.constant(0.0)))
    assert run(model) == 1
    [node] = [node for node in model.graph if node.op_type == "Attention"]
    assert (node.attributes["is_causal"].as_int(), node.metadata_props["llmc.window"]) == (0, "5")


@pytest.mark.parametrize("how", [{"by_distance": False}, {"by_length": True}, {"perm": (2, 1, 0)}])
def test_a_bias_that_is_looked_up_otherwise_is_refused(build: Any, how: dict[str, Any]) -> None:
    qkv(build)
    with pytest.raises(LlmcError, match="looked up in a weight, and not by distance alone"):
        run(encoder(build, bucketed(build, **how)))


def test_a_bias_that_is_looked_up_for_all_heads_together_is_refused(build: Any) -> None:
    qkv(build)
    together = build.op("ReduceMean", bucketed(build), build.constant([0, 1]), keepdims=0)
    with pytest.raises(LlmcError, match="looked up in a weight, and not by distance alone"):
        run(encoder(build, together))


def test_an_encoders_window_that_is_longer_than_is_worked_out_is_refused(build: Any) -> None:
    qkv(build)
    queries, keys = places(build)
    apart = build.op("Abs", build.op("Sub", keys, queries))
    far = build.op("Greater", apart, build.constant(ir.tensor(np.array(5000))))
    model = encoder(build, mask=build.op("Where", far, build.constant(LOWEST), build.constant(0.0)))
    with pytest.raises(LlmcError, match="has the number 5000 in it, and may be a sliding window"):
        form_attention(model, n_context=8192)


def test_a_bias_that_is_looked_up_beside_something_else_is_refused(build: Any) -> None:
    qkv(build)
    model = encoder(build, bucketed(build), alibi(build))
    with pytest.raises(LlmcError, match="stands beside another one, a softcap or a window, or in a decoder"):
        run(model)
    build = type(build)()
    qkv(build)
    model = encoder(build, bucketed(build), mask=added(build))
    del model.metadata_props[BOTH_WAYS]
    with pytest.raises(LlmcError, match="or in a decoder"):
        run(model)


def test_a_bias_by_distance_of_very_long_texts_is_refused(build: Any) -> None:
    qkv(build)
    bias = bucketed(build)
    build.model(bias)
    with pytest.raises(LlmcError, match="worked out for up to 4608 tokens, not 4609"):
        read_distances(bias, 4, 4609, "here")


def test_a_bias_that_is_not_linear_in_the_position_is_refused(build: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Add", build.op("Add", scores(build, q, k), build.op("Sqrt", alibi(build))), added(build))
    with pytest.raises(LlmcError, match="a bias by position that is not linear in it"):
        run(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)))


def test_a_small_slope_is_held_to_be_a_line_as_a_large_one_is(build: Any) -> None:
    """0.01 more for the far keys: less than rounding for the first head, not for the second."""
    build.sequence_inputs()
    _, keys = places(build)
    numbers = build.op("Cast", keys, to=1)
    slopes = build.constant(ir.tensor(np.array([2.0**10, 2.0**-8], np.float32).reshape(2, 1, 1)))
    more = build.constant(ir.tensor(np.array([0.0, 0.01], np.float32).reshape(2, 1, 1)))
    far = build.op("Cast", build.op("Greater", numbers, build.constant(32.0)), to=1)
    bent = build.op("Add", build.op("Mul", numbers, slopes), build.op("Mul", far, more))
    model = build.model(bent)
    with pytest.raises(LlmcError, match="not linear in it"):
        read_slopes(model.graph, [(bent, 1.0)], 2, 64, "here")


def test_a_bias_that_is_merged_with_the_mask_is_refused_by_its_name(build: Any) -> None:
    q, k, v = qkv(build)
    mask = build.op("Add", alibi(build), added(build))
    x = build.op("Add", scores(build, q, k), mask)
    with pytest.raises(LlmcError, match="ALiBi"):
        run(build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v)))


def filled(build: Any, number: float, window: int | None = None) -> ir.Model:
    q, k, v = qkv(build)
    hidden = build.op("Cast", build.op("Not", causal(build, window)), to=1)
    x = build.op("Add", scores(build, q, k), build.op("Mul", hidden, build.constant(number)))
    model: ir.Model = build.model(build.op("MatMul", build.op("Softmax", x, axis=-1), v))
    return model


def test_what_a_mask_is_filled_with_is_no_window(build: Any) -> None:
    assert form_attention(filled(build, -10000.0), n_context=16384) == 1


def test_a_window_as_long_as_a_fill_is_large_is_seen(build: Any) -> None:
    with pytest.raises(LlmcError, match="has the number 10000 in it"):
        form_attention(filled(build, -10000.0, 10000), n_context=16384)


def test_a_mask_after_which_keys_may_count_is_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="hides keys by adding -1000 to their scores") as refusal:
        run(filled(build, -1000.0))
    assert "-10000 or less" in str(refusal.value.hint)


def test_scores_that_are_changed_otherwise_are_refused_by_node(build: Any) -> None:
    q, k, v = qkv(build)
    x = build.op("Softmax", build.op("Relu", build.op("Add", scores(build, q, k), added(build))), axis=-1)
    with pytest.raises(LlmcError, match="expected softmax"):
        run(build.model(build.op("MatMul", x, v)))


def test_a_window_longer_than_what_is_worked_out_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_mask, "LONGEST", 20)
    q, k, v = qkv(build)
    x = build.op("Softmax", build.op("Add", scores(build, q, k), added(build, 32)), axis=-1)
    with pytest.raises(LlmcError, match="may be a sliding window"):
        run(build.model(build.op("MatMul", x, v)))

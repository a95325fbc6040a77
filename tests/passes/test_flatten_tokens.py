"""passes/flatten_tokens.py"""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.passes.flatten_tokens import flatten_tokens
from llmc.runtime.errors import LlmcError

HEADS = [0, 2, 1, 3]


def embed(build: Any, width: Any = 8) -> Any:
    ids, _ = build.sequence_inputs()
    return build.op("Gather", build.weight("embed", 11, width), ids)


def reshape(build: Any, x: Any, *sizes: Any) -> Any:
    """[batch, sequence, …] with its shape worked out from Shape, as the exporter does it."""
    ids = build.inputs[0]
    size = [build.op("Shape", ids, start=i, end=i + 1) for i in range(2)]
    target = build.op("Concat", *size, build.constant(list(sizes)), axis=0)
    return build.op("Reshape", x, target, shape=("batch", "sequence", *sizes), allowzero=1)


def heads(build: Any, x: Any, count: Any, size: Any) -> Any:
    return build.op("Transpose", reshape(build, x, count, size), perm=HEADS)


def attention(build: Any, q: Any, k: Any, v: Any, width: Any, **attributes: Any) -> Any:
    attributes = {"is_causal": 1, "scale": 0.5, **attributes}
    out = build.op("Attention", q, k, v, **attributes)
    return reshape(build, build.op("Transpose", out, perm=HEADS), width)


def test_heads_of_attention_come_and_go_without_a_transpose(build: Any, check: Any) -> None:
    x = embed(build)
    q, k, v = (build.op("MatMul", x, build.weight(name, 8, size)) for name, size in (("q", 8), ("k", 4), ("v", 4)))
    q, k, v = heads(build, q, 2, 4), heads(build, k, 1, 4), heads(build, v, 1, 4)
    check(build.model(attention(build, q, k, v, 8, softcap=5.0, metadata={"llmc.layer": "3"})), flatten_tokens, 13)


def test_rotary_takes_rows_of_tokens(build: Any, check: Any) -> None:
    x = embed(build)
    q = heads(build, x, 2, 4)
    angles = (build.op("Gather", build.weight(name, 9, 2), build.inputs[1]) for name in ("cos", "sin"))
    turned = build.op("RotaryEmbedding", q, *angles, num_heads=2, interleaved=0)
    check(build.model(attention(build, turned, q, q, 8)), flatten_tokens, 9)


def test_window_of_the_exported_node_is_kept(build: Any) -> None:
    x = embed(build)
    q = heads(build, x, 2, 4)
    model = build.model(attention(build, q, q, q, 8, metadata={"llmc.window": "3", "llmc.layer": "0"}))
    flatten_tokens(model)
    (node,) = (node for node in model.graph if node.op_type == "CausalAttention")
    assert node.attributes["window"].as_int() == 3


def test_sinks_stay_beside_rows_of_tokens(build: Any, check: Any) -> None:
    q = heads(build, embed(build), 2, 4)
    settings = {"scale": 0.5, "softcap": 0.0, "window": 3}
    metadata = {"llmc.window": "3", "llmc.layer": "0"}
    out = build.op("llmc.SinkAttention", q, q, q, build.weight("sinks", 2), **settings, metadata=metadata)
    check(build.model(reshape(build, build.op("Transpose", out, perm=HEADS), 8)), flatten_tokens, 6)


def test_rows_of_all_sequences_are_the_tokens(build: Any, check: Any) -> None:
    x = embed(build)
    rows = build.op("Reshape", x, build.constant([-1, 8]), shape=("batch*sequence", 8))
    y = build.op("Gemm", rows, build.weight("W", 4, 8), build.weight("b", 4), transB=1)
    check(build.model(build.op("Relu", reshape(build, y, 4))), flatten_tokens, 5)


def test_axes_are_counted_without_the_batch(build: Any, check: Any) -> None:
    x = reshape(build, embed(build), 2, 4)
    a, b = build.op("Split", x, axis=2, num_outputs=2, n_results=2)
    y = build.op("Concat", b, a, axis=3)
    bounds = (build.constant([n]) for n in (1, 7, 3, 2))
    z = build.op("Slice", y, *bounds)
    check(build.model(build.op("ReduceMean", z, build.constant([3]), keepdims=0)), flatten_tokens, 6)


def test_norm_over_the_last_axis_of_heads_stays(build: Any, check: Any) -> None:
    x = heads(build, embed(build), 2, 4)
    y = build.op("RMSNormalization", x, build.weight("w", 4), axis=-1)
    check(build.model(reshape(build, build.op("Transpose", y, perm=HEADS), 8)), flatten_tokens, 6)


def test_tokens_are_filled_up_each_for_itself(build: Any, check: Any) -> None:
    y = build.op("Pad", embed(build), build.constant([0, 3]), None, build.constant([-1]))
    check(build.model(y), flatten_tokens, 2)


def test_filling_up_the_sequence_is_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="Pad"):
        flatten_tokens(build.model(build.op("Pad", embed(build), build.constant([0, 3]), None, build.constant([1]))))


def test_softmax_over_tokens_is_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="Softmax runs along the tokens"):
        flatten_tokens(build.model(build.op("Softmax", embed(build), axis=1)))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_slice_that_turns_the_order_round_is_refused(build: Any, axis: int) -> None:
    bounds = [build.constant([number]) for number in (-1, -(1 << 62), axis, -1)]
    with pytest.raises(LlmcError, match="Slice turns the order round"):
        flatten_tokens(build.model(build.op("Slice", embed(build), *bounds, shape=("batch", "sequence", 8))))


def test_sum_over_tokens_is_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match=r"ReduceSum gives the shape .*not one over tokens"):
        flatten_tokens(build.model(build.op("ReduceSum", embed(build), build.constant([1]))))


def test_product_of_tokens_with_tokens_is_refused(build: Any) -> None:
    x = embed(build)
    turned = build.op("Transpose", x, perm=[0, 2, 1])
    with pytest.raises(LlmcError, match=r"MatMul gives the shape .*not one over tokens"):
        flatten_tokens(build.model(build.op("MatMul", turned, x)))


def streams(build: Any, x: Any) -> Any:
    """Two of them, [2, batch, sequence, 8]."""
    first, second = (build.op("Unsqueeze", value, build.constant([0])) for value in (x, build.op("Relu", x)))
    return build.op("Concat", first, second, axis=0)


def test_each_tokens_streams_are_mixed_by_its_own_matrix(build: Any, check: Any) -> None:
    """As AltUp's (Gemma 3n)."""
    x = embed(build)
    shares = reshape(build, build.op("MatMul", x, build.weight("w", 8, 4)), 2, 2)
    mixed = build.op("MatMul", build.op("Transpose", streams(build, x), perm=[1, 2, 3, 0]), shares)
    y = build.op("Transpose", mixed, perm=[3, 0, 1, 2])
    check(build.model(build.op("Gather", y, build.constant(ir.tensor(np.array(1))), axis=0)), flatten_tokens, 11)


@pytest.mark.parametrize("op", ["Tile", "Expand"])
def test_what_all_streams_get_is_repeated_within_each_token(build: Any, check: Any, op: str) -> None:
    x = embed(build)
    one = build.op("Expand", x, build.constant([1, 1, 1, 1]), shape=(1, "batch", "sequence", 8))
    each = build.op(op, one, build.constant([2, 1, 1, 1]), shape=(2, "batch", "sequence", 8))
    y = build.op("Add", build.op("Mul", streams(build, x), each), x)  # and x meets them as it is
    check(build.model(build.op("Gather", y, build.constant(ir.tensor(np.array(0))), axis=0)), flatten_tokens, 10)


def test_repeating_more_than_one_element_is_refused(build: Any) -> None:
    repeated = build.op("Tile", embed(build), build.constant([1, 1, 2]), shape=("batch", "sequence", 16))
    with pytest.raises(LlmcError, match="Tile repeats more than one element"):
        flatten_tokens(build.model(repeated))


def test_repeating_between_the_tokens_axes_is_refused(build: Any) -> None:
    repeated = build.op("Expand", embed(build), build.constant([1, 6, 6, 8]), shape=("batch", 6, "sequence", 8))
    with pytest.raises(LlmcError, match="Expand takes"):
        flatten_tokens(build.model(repeated))


def test_attention_that_is_not_causal_is_of_all_tokens(build: Any, check: Any) -> None:
    q = heads(build, embed(build), 2, 4)
    check(build.model(attention(build, q, q, q, 8, is_causal=0)), flatten_tokens, 6)


def test_biases_by_distance_stay(build: Any, check: Any) -> None:
    q = heads(build, embed(build), 2, 4)
    settings = {"scale": 0.5, "softcap": 0.0, "metadata": {"llmc.window": "0", "llmc.layer": "3"}}
    x = build.op("llmc.DistanceAttention", q, q, q, build.weight("biases", 2, 128), **settings)
    x = build.op("Transpose", x, perm=[0, 2, 1, 3])
    check(build.model(build.op("Reshape", x, build.constant([0, 0, 8]))), flatten_tokens, 6)


@pytest.mark.parametrize("op", ["llmc.PoolMean", "llmc.PoolFirst"])
def test_a_text_is_pooled_along_its_tokens(build: Any, check: Any, op: str) -> None:
    check(build.model(build.op(op, embed(build))), flatten_tokens, 2)


def test_attention_with_a_mask_is_refused(build: Any) -> None:
    q = heads(build, embed(build), 2, 4)
    mask = build.constant(ir.tensor(np.zeros((6, 6), np.float32)))
    with pytest.raises(LlmcError, match="has a mask or a cache"):
        flatten_tokens(build.model(build.op("Attention", q, q, q, mask)))


def test_heads_of_keys_that_queries_cannot_share_alike_are_refused(build: Any) -> None:
    x = embed(build)
    q, k = heads(build, x, 4, 2), heads(build, build.op("MatMul", x, build.weight("w", 8, 6)), 3, 2)
    with pytest.raises(LlmcError, match="4 heads of queries, which 3 of keys"):
        flatten_tokens(build.model(attention(build, q, k, k, 8)))


def test_an_axis_of_one_in_front_of_the_sequence_is_no_matter(build: Any, check: Any) -> None:
    x = build.op("Unsqueeze", embed(build), build.constant([1]))
    check(build.model(reshape(build, x, 2, 4)), flatten_tokens, 3)


def test_reshape_that_mixes_tokens_is_refused(build: Any) -> None:
    x = heads(build, embed(build), 2, 4)
    with pytest.raises(LlmcError, match="Reshape turns"):
        flatten_tokens(build.model(reshape(build, x, 8)))


def test_constant_with_an_axis_of_tokens_is_refused(build: Any) -> None:
    shape = ("batch", "sequence", 8)
    model = build.model(build.op("Add", embed(build), build.weight("mask", 1, 6, 8), shape=shape))
    with pytest.raises(LlmcError, match="Add takes mask"):
        flatten_tokens(model)


def test_a_constant_that_is_the_same_for_all_tokens_needs_no_axes_for_them(build: Any, check: Any) -> None:
    """As Falcon-H1's multipliers."""
    check(build.model(build.op("Mul", embed(build), build.weight("multipliers", 1, 1, 8))), flatten_tokens, 2)


def test_unknown_operator_is_refused(build: Any) -> None:
    with pytest.raises(LlmcError, match="CumSum is not known to keep tokens apart"):
        flatten_tokens(
            build.model(build.op("CumSum", embed(build), build.constant([1]), shape=("batch", "sequence", 8)))
        )


def test_experts_take_tokens_one_by_one(build: Any, check: Any) -> None:
    """The router's choice is made within each token."""
    x = build.op("Reshape", embed(build), build.constant([-1, 8]), shape=("batch*sequence", 8))
    chances = build.op("Softmax", build.op("MatMul", x, build.weight("gate", 8, 4)), axis=-1)
    share, index = build.op("TopK", chances, build.constant([2]), n_results=2, axis=-1)
    gate_up, down = build.weight("gate_up", 4, 10, 8), build.weight("down", 4, 8, 5)
    y = build.op("llmc.ExpertsSilu", x, index, share, gate_up, down)
    check(build.model(reshape(build, y, 8)), flatten_tokens, 7)


def test_layers_with_a_state_take_tokens_in_order(build: Any, check: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("table", 11, 24), ids)
    first = build.op("Transpose", x, perm=[1, 0, 2])
    mixed = build.op("llmc.CausalConv", first, build.weight("w", 24, 3), silu=1)
    parts = build.op("Split", mixed, build.constant([8, 8, 8]), axis=2, n_results=3)
    heads = [build.op("Reshape", part, build.constant([0, 0, 2, 4])) for part in parts]
    gates = [build.op("ReduceMean", head, build.constant([3]), keepdims=0) for head in heads[:2]]
    y = build.op("llmc.GatedDeltaRule", *heads, *gates, scale=0.5, epsilon=1e-6)
    flat = build.op("Reshape", build.op("Transpose", y, perm=[1, 0, 2, 3]), build.constant([0, 0, 8]))
    check(build.model(flat), flatten_tokens, 12)


def test_a_state_that_goes_from_sequence_to_sequence_is_refused(build: Any) -> None:
    ids, _ = build.sequence_inputs()
    x = build.op("Gather", build.weight("table", 11, 24), ids)
    model = build.model(build.op("llmc.CausalConv", x, build.weight("w", 24, 3), silu=1))
    with pytest.raises(LlmcError, match="CausalConv has tokens elsewhere than in axes 0 and 1"):
        flatten_tokens(model)


def test_shares_are_looked_up_within_each_token(build: Any, check: Any) -> None:
    """As ERNIE's router, which chooses by other numbers than it weighs by."""
    chances = build.op("Softmax", embed(build), axis=-1)
    _, index = build.op("TopK", build.op("Add", chances, build.weight("bias", 8)), build.constant([2]), n_results=2)
    check(build.model(build.op("GatherElements", chances, index, axis=-1)), flatten_tokens, 5)


def test_looking_up_what_is_no_tokens_own_is_refused(build: Any) -> None:
    _, index = build.op("TopK", embed(build), build.constant([2]), n_results=2)
    with pytest.raises(LlmcError, match="GatherElements looks up by token"):
        flatten_tokens(build.model(build.op("GatherElements", build.weight("w", 1, 6, 8), index, axis=-1)))


def test_experts_chosen_along_tokens_are_refused(build: Any) -> None:
    x = embed(build)
    _, index = build.op("TopK", x, build.constant([1]), n_results=2, axis=1)
    with pytest.raises(LlmcError, match=r"TopK gives the shape .*not one over tokens"):
        flatten_tokens(build.model(x, index))


def test_a_part_of_keys_that_all_heads_share_is_repeated_within_each_token(build: Any, check: Any) -> None:
    x = build.op("Unsqueeze", embed(build), build.constant([1]))
    part = build.op("MatMul", x, build.weight("w", 8, 4))
    repeated = build.op("Expand", part, build.constant([1, 3, 1, 1]))
    heads = build.op("Concat", repeated, repeated, axis=-1)
    check(build.model(build.op("Transpose", heads, perm=[0, 2, 1, 3])), flatten_tokens, 6)

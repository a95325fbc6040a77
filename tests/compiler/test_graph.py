"""compiler/graph: text, evaluation, files, binding, and what a step graph is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llmc.compiler import graph
from llmc.compiler.graph.run import SMALL_WEIGHT, extract
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

PAGE = ("n_pages", 2, 64, 8)
SIZES = {"M": 3, "R": 1, "P": 2, "n_pages": 4}


def step_graph(vocabulary: int = 11) -> ir.Model:
    """One layer of attention between an embedding and a head."""

    def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def weight(name: str, *shape: int) -> ir.Value:
        array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        shaped = value(name, ir.DataType.FLOAT, *shape)
        shaped.const_value = Weight.of_array(name, array)
        return shaped

    ids = [value(n, ir.DataType.INT64, d) for n, d in (("tokens", "M"), ("positions", "M"))]
    inputs = [*ids, value("page_table", ir.DataType.INT64, "M", "P"), value("rows", ir.DataType.INT64, "R")]
    inputs += [value(f"{kind}_cache.0", ir.DataType.FLOAT, *PAGE) for kind in "kv"]
    tokens, positions, page_table, rows, k_cache, v_cache = inputs
    weights = [weight("embed", vocabulary, 64), weight("head", vocabulary, 32)]
    last = ir.Node("llmc", "Linear", [tokens, weights[1]])
    whole = ir.Graph(inputs, [], nodes=[last], initializers=weights, opset_imports={"": 23, "llmc": 1}, name="step")
    qkv = graph.emit(last, "Gather", [weights[0], tokens], axis=0)[0]
    settings: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "head_dim": 8, "scale": 0.3, "softcap": 0.0}
    operands = [qkv, positions, page_table, k_cache, v_cache]
    out, *caches = graph.emit(last, "llmc.PagedAttention", operands, n_results=3, window=0, layer=0, **settings)
    wanted = graph.emit(last, "Gather", [out, rows], axis=0)[0]
    logits = graph.emit(last, "llmc.Linear", [wanted, weights[1]])[0]
    whole.remove(last, safe=True)
    for result, name in zip((logits, *caches), ("logits", "k_cache.0_out", "v_cache.0_out"), strict=True):
        result.name = name
        whole.outputs.append(result)
    return ir.Model(whole, ir_version=10)


def feeds() -> dict[str, np.ndarray[Any, Any]]:
    caches = {f"{kind}_cache.0": np.zeros((4, *PAGE[1:]), np.float32) for kind in "kv"}
    ids = {"tokens": np.array([1, 2, 3]), "positions": np.arange(3), "rows": np.array([2])}
    return {**ids, "page_table": np.array([[2, 0]] * 3), **caches}


def test_text_is_the_same_whatever_values_are_called(golden: Callable[[object], None]) -> None:
    model = step_graph()
    text = graph.to_text(model)
    golden(text)
    for index, node in enumerate(model.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"other_{index}"
    assert graph.to_text(model) == text


def test_numbered_values_are_called_what_the_text_calls_them() -> None:
    model = step_graph()
    text = graph.to_text(model)
    graph.number_values(model.graph)
    for node in model.graph:
        for value in node.outputs:
            assert f"{value.name}" in text
    assert [node.name for node in model.graph] == ["0.Gather", "1.PagedAttention", "2.Gather", "3.Linear"]


def test_operators_are_counted_by_name() -> None:
    assert graph.count_ops(step_graph()) == {"Gather": 2, "llmc.PagedAttention": 1, "llmc.Linear": 1}


def test_evaluation_leaves_the_graph_as_it_was() -> None:
    model = step_graph()
    text = graph.to_text(model)
    results = graph.evaluate(model, feeds())
    assert {name: array.shape for name, array in results.items()} == {
        "logits": (1, 11),
        "k_cache.0_out": (4, 2, 64, 8),
        "v_cache.0_out": (4, 2, 64, 8),
    }
    assert graph.to_text(model) == text
    assert not model.functions


def test_clone_shares_weights_and_nothing_else() -> None:
    model = step_graph()
    text = graph.to_text(model)
    copy = graph.clone(model)
    assert copy.graph.initializers["embed"].const_value is model.graph.initializers["embed"].const_value
    next(iter(copy.graph)).outputs[0].shape = ir.Shape([1])
    copy.graph.inputs.pop()
    assert graph.to_text(model) == text


def test_saved_graph_is_valid_and_holds_no_large_weight(tmp_path: Path) -> None:
    model = step_graph(vocabulary=SMALL_WEIGHT // 64 + 1)
    text = graph.to_text(model)
    path = tmp_path / "step.onnx"
    graph.save_onnx(model, path)
    onnx.checker.check_model(str(path))
    saved = ir.load(path)
    assert "embed" in [value.name for value in saved.graph.inputs]
    assert "head" in saved.graph.initializers
    assert path.stat().st_size < 32768
    assert graph.to_text(model) == text


def test_saved_graph_runs_once_the_weights_are_given(tmp_path: Path) -> None:
    model = step_graph(vocabulary=SMALL_WEIGHT // 64 + 1)
    graph.save_onnx(model, tmp_path / "step.onnx")
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    saved = ir.load(tmp_path / "step.onnx")
    assert np.array_equal(graph.evaluate(saved, feeds() | weights)["logits"], graph.evaluate(model, feeds())["logits"])


def test_stage_is_dumped_as_text_and_onnx(tmp_path: Path) -> None:
    model = step_graph()
    graph.dump_stage(model, tmp_path / "stages", 7, "gather_rows")
    assert (tmp_path / "stages" / "07_gather_rows.txt").read_text() == graph.to_text(model) + "\n"
    assert (tmp_path / "stages" / "07_gather_rows.onnx").exists()


def test_what_is_wrong_with_a_weight_is_said_by_whoever_reads_it(tmp_path: Path) -> None:
    def read() -> np.ndarray[Any, Any]:
        raise LlmcError("the weight is no good")

    model = step_graph()
    model.graph.initializers["head"].const_value = Weight.computed("head", (11, 32), read)
    for use in (lambda: graph.evaluate(model, feeds()), lambda: graph.dump_stage(model, tmp_path, 1, "any")):
        with pytest.raises(LlmcError, match="the weight is no good"):
            use()


def test_binding_gives_every_value_a_shape_in_numbers() -> None:
    model = step_graph()
    shapes = graph.bind(model, SIZES)
    by_name = {str(value.name): shape for value, shape in shapes.items()}
    assert by_name["logits"] == (1, 11)
    assert by_name["page_table"] == (3, 2)
    assert by_name["embed"] == (11, 64)
    assert len(shapes) == 6 + 2 + 6


def test_binding_without_a_symbol_is_an_error() -> None:
    with pytest.raises(KeyError, match="n_pages"):
        graph.bind(step_graph(), {"M": 1, "R": 1, "P": 1})


def test_extracted_part_outlives_the_graph() -> None:
    model = step_graph()
    gather = next(iter(model.graph))
    part = extract(gather.outputs[0], [model.graph.inputs[0]])
    embed = model.graph.initializers["embed"].const_value
    model.graph.outputs.clear()
    graph.prune(reversed(model.graph))
    assert embed is not None
    assert np.array_equal(next(iter(graph.evaluate(part, feeds()).values())), embed.numpy()[[1, 2, 3]])


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.q_proj.weight", "a.k_proj.weight"], "a.{q,k}_proj.weight"),
        (["h.gate", "h.up"], "h.{gate,up}"),
        (["w1", "w11"], "w1{,1}"),
    ],
)
def test_joined_weights_share_a_name(names: list[str], joined: str) -> None:
    assert graph.family_name(names) == joined


# -- well-formedness -----------------------------------------------------------------------------------------------


def attention(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "PagedAttention")


def lose_an_input(model: ir.Model) -> None:
    model.graph.inputs.pop(3)


def type_tokens_as_numbers(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.FLOAT


def lose_a_cache_result(model: ir.Model) -> None:
    model.graph.outputs.pop()


def misnumber_the_layer(model: ir.Model) -> None:
    attention(model).attributes["layer"] = ir.AttrInt64("layer", 1)


def swap_the_caches(model: ir.Model) -> None:
    node = attention(model)
    k_cache, v_cache = node.inputs[3:]
    node.replace_input_with(3, v_cache)
    node.replace_input_with(4, k_cache)


def forget_a_shape(model: ir.Model) -> None:
    next(iter(model.graph)).outputs[0].shape = None


def use_another_symbol(model: ir.Model) -> None:
    next(iter(model.graph)).outputs[0].shape = ir.Shape(["batch", 64])


def share_a_name(model: ir.Model) -> None:
    first, second = list(model.graph)[:2]
    first.outputs[0].name = second.outputs[0].name = "same"


def reverse_the_order(model: ir.Model) -> None:
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])


def use_an_unknown_operator(model: ir.Model) -> None:
    next(iter(model.graph)).domain = "com.example"


def give_an_attribute_too_many(model: ir.Model) -> None:
    attention(model).attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def test_a_constant_is_shared_with_an_equal_one_and_no_other() -> None:
    whole = step_graph().graph
    weight, other = (Weight.of_array("w", np.full(2, number, np.float32)) for number in (1, 2))
    for name, array in (("numbers", np.zeros(2, np.float32)), ("ints.3", np.array([3]))):
        first = graph.add_constant(whole, array, name)
        assert graph.add_constant(whole, array.copy(), name) is first
        assert graph.add_constant(whole, array + 1, name) is not first
        assert graph.add_constant(whole, array.astype(np.float64), name) is not first
        assert graph.add_constant(whole, weight, name) is not first
    kept = graph.add_constant(whole, weight, "w")
    assert graph.add_constant(whole, weight, "w") is kept
    assert graph.add_constant(whole, other, "w") is not kept
    joined = [graph.add_constant(whole, Weight.concat([weight, other]), "both") for _ in range(2)]
    assert joined[0] is joined[1]


def leave_a_weight_unused(model: ir.Model) -> None:
    graph.add_constant(model.graph, np.zeros(2, np.float32), "unused")


def lose_a_weights_source(model: ir.Model) -> None:
    model.graph.initializers["embed"].const_value = None


def let_attention_depend_on_rows(model: ir.Model) -> None:
    node = attention(model)
    table = graph.emit(node, "Gather", [node.inputs[0], model.graph.inputs[3]], axis=0)[0]
    node.replace_input_with(0, table)


OFFENCES: dict[Callable[[ir.Model], None], str] = {
    lose_an_input: "inputs are",
    type_tokens_as_numbers: r"its type is f32\[M\], not i64\[M\]",
    lose_a_cache_result: "results are",
    misnumber_the_layer: "attention node 0 says layer 1",
    swap_the_caches: "uses other caches",
    forget_a_shape: "its type is",
    use_another_symbol: "has the symbols batch",
    share_a_name: "share a name",
    reverse_the_order: "before it is made",
    use_an_unknown_operator: "unknown operator com.example.Gather",
    give_an_attribute_too_many: "has the attributes",
    leave_a_weight_unused: "nothing uses it",
    lose_a_weights_source: "no source",
    let_attention_depend_on_rows: "attention depends on rows",
}


def test_step_graph_is_accepted() -> None:
    graph.check_step_graph(step_graph())


@pytest.mark.parametrize("offend", OFFENCES)
def test_what_is_no_step_graph_is_refused(offend: Callable[[ir.Model], None]) -> None:
    model = step_graph()
    graph.number_values(model.graph)
    offend(model)
    with pytest.raises(LlmcError, match=OFFENCES[offend]):
        graph.check_step_graph(model)

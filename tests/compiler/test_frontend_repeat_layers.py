"""Layers are repeated only where they differ in nothing but their index."""

import onnx_ir as ir
import pytest
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTJConfig,
    Llama4TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
)

from llmc.compiler.frontend.export import export_graph
from llmc.compiler.frontend.export.repeat_layers import LayersDifferError, Repetition, repeat_layers, shorten


def some_layers(constants: tuple[float, ...] = (1.0, 1.0, 1.0), skip: bool = False) -> ir.Model:
    """h' = elu(h + layers.i.weight, constant) a few times, then + norm.  skip: the third layer adds the first's too."""

    def weight(name: str) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))

    def result(name: str) -> ir.Value:
        return weight(name)

    first = hidden = weight("input")
    nodes, weights = [], [weight("norm")]
    for layer, constant in enumerate(constants):
        weights.append(weight(f"layers.{layer}.weight"))
        add = ir.Node("", "Add", [hidden, weights[-1]], outputs=[result(f"sum{layer}")], name=f"add{layer}")
        elu = ir.Node(
            "",
            "Elu",
            add.outputs,
            [ir.AttrFloat32("alpha", constant)],
            outputs=[result(f"elu{layer}")],
            name=f"elu{layer}",
            metadata_props={"llmc.layer": str(layer)},
        )
        nodes += [add, elu]
        hidden = elu.outputs[0]
        if skip and layer == 2:
            nodes.append(ir.Node("", "Add", [hidden, nodes[1].outputs[0]], outputs=[result("skip")], name="skip"))
            hidden = nodes[-1].outputs[0]
    nodes.append(ir.Node("", "Add", [hidden, weights[0]], outputs=[result("output")], name="tail"))
    graph = ir.Graph([first], nodes[-1].outputs, nodes=nodes, initializers=weights, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def test_equal_layers_are_repeated() -> None:
    model = some_layers()
    repeat_layers(model, "layers.", 5, Repetition(1, 1))
    graph = model.graph
    assert [node.op_type for node in graph] == ["Add", "Elu"] * 5 + ["Add"]
    assert sorted(graph.initializers) == [*(f"layers.{i}.weight" for i in range(5)), "norm"]
    nodes = list(graph)
    for layer in range(5):
        add, elu = nodes[2 * layer : 2 * layer + 2]
        assert add.inputs[0] is (graph.inputs[0] if layer == 0 else nodes[2 * layer - 1].outputs[0])
        assert add.inputs[1] is graph.initializers[f"layers.{layer}.weight"]
        assert elu.inputs[0] is add.outputs[0]
        assert elu.metadata_props == {"llmc.layer": str(layer)}
    assert nodes[-1].inputs[0] is nodes[-2].outputs[0]
    assert len({node.name for node in nodes}) == len({value.name for node in nodes for value in node.outputs}) == 11


def test_rounds_of_layers_are_repeated_behind_the_first() -> None:
    model = some_layers((3.0, 1.0, 2.0, 1.0, 2.0))
    repeat_layers(model, "layers.", 9, Repetition(1, 2))
    nodes = list(model.graph)
    assert [node.op_type for node in nodes] == ["Add", "Elu"] * 9 + ["Add"]
    assert [node.attributes["alpha"].value for node in nodes[1::2]] == [3.0] + [1.0, 2.0] * 4
    for layer in range(9):
        add, elu = nodes[2 * layer : 2 * layer + 2]
        assert add.inputs[1] is model.graph.initializers[f"layers.{layer}.weight"]
        assert add.inputs[0] is (model.graph.inputs[0] if layer == 0 else nodes[2 * layer - 1].outputs[0])
        assert elu.metadata_props == {"llmc.layer": str(layer)}
    assert nodes[-1].inputs[0] is nodes[-2].outputs[0]


@pytest.mark.parametrize(
    "model", [some_layers((1.0, 0.5, 0.25)), some_layers(skip=True)], ids=["another constant", "a layer is skipped"]
)
def test_layers_that_differ_are_refused_and_left_alone(model: ir.Model) -> None:
    before = ir.to_onnx_text(model)
    with pytest.raises(LayersDifferError):
        repeat_layers(model, "layers.", 5, Repetition(1, 1))
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(num_hidden_layers=32), Repetition(1, 1)),
        (LlamaConfig(num_hidden_layers=5), Repetition(1, 1)),
        (LlamaConfig(num_hidden_layers=4), None),
        (Gemma2Config(num_hidden_layers=26), Repetition(2, 2)),
        (Gemma2Config(num_hidden_layers=9), Repetition(1, 2)),
        (Gemma2Config(num_hidden_layers=8), Repetition(2, 2)),
        (Gemma2Config(num_hidden_layers=7), Repetition(1, 2)),
        (Gemma2Config(num_hidden_layers=6), None),
        (Gemma3TextConfig(num_hidden_layers=26), Repetition(2, 6)),
        (Gemma3TextConfig(num_hidden_layers=18), None),
        (DeepseekV3Config(num_hidden_layers=61, first_k_dense_replace=3), Repetition(3, 1)),
        (Llama4TextConfig(num_hidden_layers=48), Repetition(4, 4)),
        (Llama4TextConfig(num_hidden_layers=48, interleave_moe_layer_step=8), Repetition(8, 8)),
        (Qwen3_5TextConfig(num_hidden_layers=24), Repetition(4, 4)),
        (LlamaConfig(num_hidden_layers=1), None),
    ],
)
def test_a_configuration_is_shortened_to_what_comes_before_two_rounds(
    config: PretrainedConfig, expected: Repetition | None
) -> None:
    found = shorten(config)
    assert (found[1] if found else None) == expected
    if found and expected:
        assert found[0].num_hidden_layers == expected.n_first + 2 * expected.period


def test_a_table_that_all_layers_share_is_no_layers() -> None:
    """GPT-J's angles are a buffer of each layer."""
    config = GPTJConfig(
        n_layer=6,
        n_embd=64,
        n_head=4,
        n_inner=64,
        rotary_dim=16,
        n_positions=2048,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    graph = export_graph(config).graph
    repeated = {(node.name or "").rpartition(".")[2] for node in graph}
    assert repeated >= {"3", "4", "5"}
    assert all(name == value.name for name, value in graph.initializers.items())
    assert not [name for name in graph.initializers if "embed_positions" in name]


def test_layers_that_share_keys_and_values_are_exported_whole() -> None:
    """Fewer layers would be others: which share is counted from the last one."""
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    assert shorten(Gemma4TextConfig(num_hidden_layers=20, layer_types=kinds * 4)) is not None
    assert shorten(Gemma4TextConfig(num_hidden_layers=20, layer_types=kinds * 4, num_kv_shared_layers=10)) is None

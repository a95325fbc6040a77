"""The exported graph says what the model says, under the checkpoint's names, and reads no weight."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmc.compiler.frontend import SourceModel, graph_cache, load_source
from llmc.compiler.frontend.checkpoint import StoredTensor
from llmc.compiler.frontend.export import exporter
from llmc.compiler.frontend.known import KNOWN_MODELS, KnownModel
from llmc.compiler.weights import Weight
from llmc.runtime.errors import LlmcError

TinyModel = Callable[[str], Path]
TinyConfig = Callable[[str], PretrainedConfig]
SaveModel = Callable[..., Path]
FAMILIES = ("llama", "llama-bias", "llama-tied", "smollm3-deep", "opt", "opt-350m", "qwen3", "mistral", "phi3", "gpt2")
"""More of them in tests/passes/test_pipeline.py and tests/test_families.py."""


def run_graph(source: SourceModel, tokens: np.ndarray, tmp_path: Path) -> np.ndarray:
    """The graph's logits, by ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = tmp_path / "graph.onnx"
    ir.save(source.graph, file)
    session = onnxruntime.InferenceSession(file, options)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    (logits,) = session.run(None, {"input_ids": tokens, "position_ids": positions})
    return np.asarray(logits)


def ops(source: SourceModel) -> Counter[str]:
    return Counter(node.op_type for node in source.graph.graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_computes_what_transformers_computes(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(family)
    source = load_source(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for shape in ((1, 1), (2, 21)):
        tokens = np.random.default_rng(0).integers(0, source.n_vocab, shape)
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
        error = np.abs(run_graph(source, tokens, tmp_path) - expected).max()
        assert error < 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_checkpoints_names_and_one_attention_stands_in_each_layer(
    family: str, tiny_model: TinyModel
) -> None:
    source = load_source(str(tiny_model(family)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    initializers = source.graph.graph.initializers.values()
    weights = {value.name: value.const_value for value in initializers if isinstance(value.const_value, Weight)}
    assert set(weights) <= set(model.state_dict())
    assert len(weights) == len(list(model.parameters()))
    assert ops(source)["Attention"] == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"RMSNormalization": 5, "RotaryEmbedding": 4, "Cos": 1, "Sin": 1}),
        ("opt", {"LayerNormalization": 5, "RotaryEmbedding": 0}),
    ],
)
def test_norms_and_rotary_embeddings_are_single_nodes(
    family: str, expected: dict[str, int], tiny_model: TinyModel
) -> None:
    counts = ops(load_source(str(tiny_model(family))))
    assert {op: counts[op] for op in expected} == expected
    assert counts["ReduceMean"] == counts["Sqrt"] == 0


def test_every_value_has_a_type_and_the_dimensions_have_names(tiny_model: TinyModel) -> None:
    graph = load_source(str(tiny_model("llama"))).graph.graph
    assert [(value.name, str(value.shape)) for value in graph.inputs] == [
        ("input_ids", "[batch,sequence]"),
        ("position_ids", "[batch,sequence]"),
    ]
    assert [(value.name, str(value.shape)) for value in graph.outputs] == [("logits", "[batch,sequence,131]")]
    for node in graph:
        for value in node.outputs:
            assert value.dtype is not None
            assert value.shape is not None


def test_attention_nodes_carry_their_layer_and_window(tiny_model: TinyModel) -> None:
    for family, window in (("mistral", "24"), ("llama", "0")):
        nodes = [node for node in load_source(str(tiny_model(family))).graph.graph if node.op_type == "Attention"]
        carried = [dict(node.metadata_props) for node in nodes]
        assert carried == [{"llmc.layer": str(layer), "llmc.window": window} for layer in range(2)]


def test_repeated_layers_are_numbered_in_order(tiny_model: TinyModel) -> None:
    graph = load_source(str(tiny_model("smollm3-deep"))).graph.graph
    layers = [node.metadata_props["llmc.layer"] for node in graph if node.op_type == "Attention"]
    assert layers == ["0", "1", "2", "3", "4", "5", "6"]


def test_the_graph_tells_nothing_of_the_machine_that_exported_it(tiny_model: TinyModel) -> None:
    graph = load_source(str(tiny_model("opt"))).graph
    for value in graph.graph.initializers.values():
        value.const_value = None if isinstance(value.const_value, Weight) else value.const_value
    assert "/" not in ir.to_onnx_text(graph).replace("://", "")


def test_a_tied_weight_is_one_initializer(tiny_model: TinyModel) -> None:
    source = load_source(str(tiny_model("llama-tied")))
    assert "model.embed_tokens.weight" in source.graph.graph.initializers
    assert "lm_head.weight" not in source.graph.graph.initializers
    assert source.weights["lm_head.weight"] is source.weights["model.embed_tokens.weight"]


def test_loading_reads_no_weight(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = StoredTensor.read

    def counted(self: StoredTensor) -> np.ndarray:
        reads.append(self.name)
        return read(self)

    monkeypatch.setattr(StoredTensor, "read", counted)
    source = load_source(str(tiny_model("opt")))
    assert reads == []
    source.weights["model.decoder.layers.0.fc1.bias"].numpy()
    assert reads == ["model.decoder.layers.0.fc1.bias"]


def test_a_second_load_takes_the_graph_from_the_cache(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one, to the last bit of an epsilon: kernels are known by what they are made of."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    first = load_source(str(tiny_model("llama-tied")))

    def no_import(name: str) -> Any:
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(graph_cache, "import_module", no_import)
    second = load_source(str(tiny_model("llama-tied")))
    assert ir.to_proto(first.graph) == ir.to_proto(second.graph)
    assert floats_of(first) == floats_of(second) != []
    assert first.digest == second.digest


def floats_of(source: SourceModel) -> list[float]:
    attributes = [each for node in source.graph.graph for each in node.attributes.values()]
    return [each.as_float() for each in attributes if each.type == ir.AttributeType.FLOAT]


def test_a_cache_entry_is_not_believed_when_it_is_broken_or_of_another_key(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    graph = load_source(str(tiny_model("llama"))).graph
    for value in graph.graph.initializers.values():
        value.const_value = None if isinstance(value.const_value, Weight) else value.const_value
    file = tmp_path / "entry.onnx"
    graph_cache._save(graph_cache._proto(graph, "key"), file)
    assert graph_cache._load(file, "key") is not None
    assert graph_cache._load(file, "another key") is None
    file.write_bytes(file.read_bytes()[:1000])
    assert graph_cache._load(file, "key") is None
    assert graph_cache._load(tmp_path / "missing.onnx", "key") is None


def test_a_graph_is_exported_again_when_what_exports_it_has_changed() -> None:
    """The cache's key has the text of each file of the frontend that the exporter is made of."""
    folder = Path(exporter.__file__).parent
    texts = "".join(file.read_text() for file in folder.glob("*.py"))
    files = {f"{name}.py" for name in re.findall(r"from llmc\.compiler\.frontend\.(\w+) import", texts)}
    assert files - {"quiet.py", "source.py"} <= set(graph_cache.EXPORTERS)
    assert all(any(folder.parent.glob(name)) for name in graph_cache.EXPORTERS)


def test_a_cache_that_cannot_be_written_is_no_error_and_changes_nothing(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    (tmp_path / "file").write_bytes(b"")
    for cache in (tmp_path / "file", tmp_path / "folder"):
        monkeypatch.setenv("LLMC_CACHE", str(cache))
        found.append(load_source(str(tiny_model("llama-tied"))))
    without, cached = found
    assert ir.to_proto(without.graph) == ir.to_proto(cached.graph)
    assert floats_of(without) == floats_of(cached) != []


def test_the_context_is_the_models_own_unless_a_shorter_one_is_asked_for(tiny_model: TinyModel) -> None:
    folder = str(tiny_model("llama"))
    assert load_source(folder).n_context == 96
    assert load_source(folder, max_sequence=64).n_context == 64
    for asked in (0, 97):
        with pytest.raises(LlmcError, match=f"sequences of 1 to 96 tokens, not {asked}"):
            load_source(folder, max_sequence=asked)


def test_angles_that_would_change_in_longer_texts_are_those_of_the_models_own_positions(
    save_model: SaveModel, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}
    folder = save_model(config)
    source = load_source(str(folder))
    tokens = np.random.default_rng(0).integers(0, source.n_vocab, (1, source.n_context))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    assert np.abs(run_graph(source, tokens, tmp_path) - expected).max() < 1e-4 * np.ptp(expected)


def test_random_weights_take_any_number_of_positions(tiny_model: TinyModel) -> None:
    source = load_source(str(tiny_model("llama")), "random", max_sequence=200)
    assert source.n_context == 200
    assert source.notes[0] == "made for 96 positions; its random weights have 200"


def test_weights_are_stored_as_asked_and_the_reference_keeps_the_checkpoints(
    save_model: SaveModel, tiny_config: TinyConfig
) -> None:
    folder = str(save_model(tiny_config("llama"), torch.float16))
    source = load_source(folder)
    name = "model.norm.weight"
    assert (source.dtype, source.weights[name].stored_dtype) == ("bf16", "f16")
    weight = source.graph.graph.initializers[name].const_value
    assert isinstance(weight, Weight)
    assert weight.stored_dtype == "bf16"
    assert any("float16" in note for note in source.notes)
    assert load_source(folder, dtype="f32").notes == ()


def test_random_weights_need_a_configuration_alone(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (tiny_model("llama") / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    source = load_source(str(tmp_path), weights="random")
    assert source.random
    assert source.digest == load_source(str(tmp_path), weights="random").digest
    assert source.digest != load_source(str(tmp_path), weights="random", seed=1).digest
    known = KnownModel("owner/name", load_source(str(tmp_path), weights="random").config)
    monkeypatch.setitem(KNOWN_MODELS, "tiny-1m", known)
    by_name = load_source("tiny-1m", weights="random")
    assert (by_name.name, by_name.folder, by_name.digest) == ("tiny-1m", None, source.digest)


def test_checkpoints_that_leave_out_the_models_prefix_are_read(tmp_path: Path, tiny_model: TinyModel) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model("opt")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = ["model.decoder.embed_positions.weight", "lm_head.weight"]
    whole, bare = load_source(str(folder)), load_source(str(tmp_path))
    for name in names:
        np.testing.assert_array_equal(whole.weights[name].numpy(), bare.weights[name].numpy())


def test_sharded_checkpoints_are_read_through_their_index(save_model: SaveModel, tiny_config: TinyConfig) -> None:
    whole = load_source(str(save_model(tiny_config("llama"))))
    folder = save_model(tiny_config("llama"), max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    sharded = load_source(str(folder))
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(weight.numpy(), sharded.weights[name].numpy())


def test_checkpoints_are_told_apart_by_their_digest(save_model: SaveModel, tiny_config: TinyConfig) -> None:
    first, second = (load_source(str(save_model(tiny_config("llama"), dtype))) for dtype in (torch.float32,) * 2)
    other = load_source(str(save_model(tiny_config("llama"), torch.bfloat16)))
    assert first.digest == second.digest != other.digest


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("gemma3-1b", 999_885_952),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
        ("gpt-oss-20b", 20_914_757_184),
        ("deepseek-v2-lite", 15_706_484_224),
        ("falcon-7b", 6_921_720_704),
        ("bloom-7b1", 7_069_016_064),
        ("opt-125m", 125_239_296),
        ("opt-350m", 331_196_416),
        ("opt-1.3b", 1_315_758_080),
    ],
)
def test_known_models_have_as_many_parameters_as_published(name: str, n_parameters: int) -> None:
    from accelerate import init_empty_weights

    from llmc.compiler.frontend.config import parse_config

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(parse_config(KNOWN_MODELS[name].config, name))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters


def test_ctrl_c_inside_pytorch_is_no_fault_of_the_model(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its C++ turns the interrupt into a TypeError whose text names it."""

    def interrupted(*_: object) -> None:
        raise TypeError('empty_strided(): failed to unpack the object at pos 1 with error "KeyboardInterrupt: <EMPTY>')

    monkeypatch.setattr(exporter, "_export_repeated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exporter.export_graph(tiny_config("llama"))

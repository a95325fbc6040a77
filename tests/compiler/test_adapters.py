"""Adapters: what they make of weights is the arithmetic of their papers, and each way to be wrong is one clear line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig

import llmc
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.adapter import read_adapter
from llmc.compiler.frontend.apply_adapters import TIES, Bound, bind
from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.config import read_config
from llmc.compiler.weights import Weight
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.test_tiny import TINY  # whose graph and kernels are in the cache then

Q, DOWN, EMBED, HEAD = (
    f"{name}.weight"
    for name in (
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.embed_tokens",
        "lm_head",
    )
)
TABLE = (TINY.vocab_size, 64)
SHAPES = {Q: (64, 64), DOWN: (64, 96)}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
Tensors = dict[str, torch.Tensor]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def key(name: str, part: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.{part}"


def low_rank(rank: int = 4, shapes: dict[str, tuple[int, int]] = SHAPES) -> Tensors:
    """Matrices for each of these weights."""
    tensors: Tensors = {}
    for name, (n_out, n_in) in shapes.items():
        tensors[key(name, "lora_A.weight")] = draw(rank, n_in)
        tensors[key(name, "lora_B.weight")] = draw(n_out, rank)
    return tensors


def save(folder: Path, tensors: Tensors | None = None, settings: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(low_rank() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | (settings or {})))
    return folder


def merged(model: Path, *adapters: Path) -> Callable[[str], torch.Tensor]:
    """The weights that an artifact in float32 has."""
    return in_float32(load_source(str(model), adapters=adapters).weights)


def in_float32(weights: Mapping[str, Weight]) -> Callable[[str], torch.Tensor]:
    return lambda name: torch.from_numpy(np.array(weights[name].stored_as("f32").stored()))


def weights_alone(config: PretrainedConfig) -> ir.Model:
    """A model's graph without its nodes: to export it takes seconds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    values: dict[int, ir.Value] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if known := values.get(id(parameter)):
            known.metadata_props["llmc.tied"] = name
            continue
        shape = ir.Shape(parameter.shape)
        graph.initializers[name] = values[id(parameter)] = ir.Value(name=name, shape=shape)
    said = {"llmc.prefix": model.base_model_prefix, "llmc.architecture": type(model).__name__}
    return ir.Model(graph, ir_version=10, metadata_props=said)


def bound(graph: ir.Model, model: Path, adapter: Path) -> Bound:
    adapters = [read_adapter(adapter)]
    return bind(graph, open_checkpoint(model), read_config(model), adapters, is_part=False, place=str(model))


@pytest.fixture(scope="module")
def model(save_model: Callable[..., Path]) -> Path:
    return save_model(TINY)


@pytest.mark.parametrize(
    ("settings", "rank", "scale"),
    [
        ({}, 4, 6 / 4),
        ({"use_rslora": True}, 4, 6 / 2),
        ({"rank_pattern": {"proj": 9}}, 9, 6 / 9),
        ({"alpha_pattern": {"up_proj": 3, r"(q|down)_proj": 5}}, 4, 5 / 4),
        ({"alpha_pattern": {"own_proj": 3}}, 4, 6 / 4),
    ],
)
def test_a_weight_gets_the_product_times_alpha(
    model: Path, tmp_path: Path, settings: dict[str, Any], rank: int, scale: float
) -> None:
    stored, tensors = load_file(model / "model.safetensors"), low_rank(rank)
    weights = merged(model, save(tmp_path / "lora", tensors, settings))
    for name in (Q, DOWN):
        product = tensors[key(name, "lora_B.weight")] @ tensors[key(name, "lora_A.weight")]
        torch.testing.assert_close(weights(name), stored[name] + scale * product)
    torch.testing.assert_close(weights(HEAD), stored[HEAD], rtol=0, atol=0)


def test_magnitudes_are_the_lengths_of_rows(model: Path, tmp_path: Path) -> None:
    tensors = low_rank() | {key(name, "lora_magnitude_vector"): draw(64).abs() for name in SHAPES}
    weights = merged(model, save(tmp_path / "dora", tensors, {"use_dora": True}))
    for name in SHAPES:
        torch.testing.assert_close(weights(name).norm(dim=1), draw(64).abs())


def test_adapters_are_merged_one_after_another(model: Path, tmp_path: Path) -> None:
    whole = {key(HEAD, "weight"): draw(*TABLE), key(EMBED, "base_layer.weight"): draw(*TABLE) / 2}
    table = {key(EMBED, "lora_embedding_A"): draw(4, TABLE[0]), key(EMBED, "lora_embedding_B"): draw(64, 4)}
    first = save(tmp_path / "first", low_rank() | whole | table, {"modules_to_save": ["lm_head"]})
    weights = merged(model, first, save(tmp_path / "second"))
    tensors, stored = low_rank(), load_file(model / "model.safetensors")
    product = tensors[key(Q, "lora_B.weight")] @ tensors[key(Q, "lora_A.weight")]
    torch.testing.assert_close(weights(Q), stored[Q] + 2 * 6 / 4 * product)
    torch.testing.assert_close(weights(HEAD), draw(*TABLE), rtol=0, atol=0)
    torch.testing.assert_close(weights(EMBED), draw(*TABLE) / 2 + 6 / 4 * (draw(64, 4) @ draw(4, TABLE[0])).T)


def test_of_two_modules_with_one_tensor_only_one_is_changed(save_model: Callable[..., Path], tmp_path: Path) -> None:
    config = copy.deepcopy(TINY)
    config.tie_word_embeddings = True
    model, graph = save_model(config), weights_alone(config)
    tied = save(tmp_path / "tied", low_rank(4, {HEAD: TABLE}), {"target_modules": ["lm_head"]})
    found, stored = bound(graph, model, tied), load_file(model / "model.safetensors")
    weights = in_float32(found.weights)
    assert HEAD not in stored
    assert not found.fields[TIES]
    assert {EMBED, HEAD} <= found.graph.graph.initializers.keys()
    torch.testing.assert_close(weights(EMBED), stored[EMBED], rtol=0, atol=0)
    torch.testing.assert_close(weights(HEAD), stored[EMBED] + 6 / 4 * (draw(TABLE[0], 4) @ draw(4, 64)))
    save(tied, low_rank(4, {HEAD: TABLE}), {"target_modules": ["lm_head"], "ensure_weight_tying": True})
    with pytest.raises(LlmcError, match="ensure_weight_tying is not supported"):
        bound(graph, model, tied)


@pytest.mark.parametrize(
    ("op_type", "settings", "lies_transposed"),
    [("MatMul", {}, True), ("Gemm", {}, True), ("Gemm", {"transB": 1}, False)],
)
def test_a_weight_that_lies_transposed_is_changed_so(
    tmp_path: Path, op_type: str, settings: dict[str, Any], lies_transposed: bool
) -> None:
    name, stored = "h.weight", draw(64, 64) / 2  # square: its shape does not say how it lies
    save_file({name: stored}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    x, weight = ir.Value(name="x"), ir.Value(name=name, shape=ir.Shape(stored.shape))
    node = ir.node(op_type, [x, weight], settings)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23})
    graph.initializers[name] = weight
    model = ir.Model(graph, ir_version=10, metadata_props={"llmc.prefix": "transformer"})
    found = bound(model, tmp_path, save(tmp_path / "lora", low_rank(4, {name: (64, 64)}), {"target_modules": ["h"]}))
    product = 6 / 4 * (draw(64, 4) @ draw(4, 64))
    wanted = stored + (product.T if lies_transposed else product)
    torch.testing.assert_close(in_float32(found.weights)(name), wanted)


def test_an_expert_is_found_under_the_checkpoints_name(save_model: Callable[..., Path], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_local_experts": 4, "vocab_size": 160}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, **heads, max_position_embeddings=64)
    model = save_model(config, torch.bfloat16)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    adapter = save(tmp_path / "lora", low_rank(4, {name: (48, 64)}), {"target_modules": ["w1"]})
    weights = in_float32(bound(weights_alone(config), model, adapter).weights)
    experts = weights("model.layers.1.mlp.experts.gate_up_proj")
    stored = load_file(model / "model.safetensors")
    torch.testing.assert_close(experts[2, :48], stored[name].float() + 6 / 4 * (draw(48, 4) @ draw(4, 64)))
    torch.testing.assert_close(experts[1, :48], stored[name.replace("2", "1")].float(), rtol=0, atol=0)


def test_an_adapters_folder_compiles_with_its_model(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "mine", None, {"base_model_name_or_path": str(model), "target_modules": ["q_proj", "x"]})
    report = llmc.compile(folder, out=tmp_path / "m.so", dtype="f32", batch=(1, 2))
    assert report["certificate"]["status"] == "passed"
    assert report["notes"] == ["the adapter mine names a target module that the model has not: x"]
    with ArtifactFile.open(tmp_path / "m.so") as artifact:
        said = artifact.manifest()["model"]
    assert said["name"] == f"{model.name}+mine"
    assert said["adapters"] == [read_adapter(folder).record]
    plain, other = load_source(str(model)), load_source(str(model), adapters=[save(tmp_path / "other")])
    assert len({plain.digest, other.digest, said["source_sha256"]}) == 3
    np.testing.assert_array_equal(
        np.array(other.weights[Q].stored_as("bf16").numpy()),
        torch.from_numpy(np.array(other.weights[Q].stored_as("f32").stored())).bfloat16().float().numpy(),
    )


def without(part: str) -> Tensors:
    return {name: tensor for name, tensor in low_rank().items() if part not in name}


WRONG: dict[str, tuple[Tensors | None, dict[str, Any], str]] = {
    "another kind": (None, {"peft_type": "IA3"}, "its kind is 'IA3', and only LORA is supported"),
    "biases": (None, {"bias": "all"}, "it changes biases too"),
    "another base": (None, {"init_lora_weights": "pissa_niter_4"}, "it is for a base that training changed"),
    "a setting": (None, {"trainable_token_indices": [1]}, "trainable_token_indices = .1. is not supported"),
    "a later setting": (None, {"use_magic": True}, "use_magic = True is not supported"),
    "a pattern": (None, {"alpha_pattern": {"(a+)+b": 1}}, "is too intricate"),
    "what is optional": (None, {"alpha_pattern": {"x?" * 40: 1}}, "is too intricate"),
    "alternatives": (None, {"alpha_pattern": {"(a|a)" * 40: 1}}, "is too intricate"),
    "no table": (None, {"rank_pattern": [4]}, "its rank_pattern is .4."),
    "no number": (None, {"lora_alpha": "6"}, "lora_alpha is '6', which is no number"),
    "a rank": (low_rank(5), {}, "have rank 5, its settings say 4"),
    "half a pair": (without("lora_A"), {}, "the adapter has lora_B for .*, which takes lora_A, lora_B"),
    "no magnitude": (None, {"use_dora": True}, "which takes lora_A, lora_B, lora_magnitude_vector"),
    "a shape": (low_rank() | {key(Q, "lora_A.weight"): draw(3, 64)}, {}, "do not fit together: .3, 64. and .64, 4."),
    "a dtype": (low_rank() | {key(Q, "lora_A.weight"): torch.ones(4, 64).int()}, {}, "unsupported dtype I32"),
    "a name": ({"model.layers.0.weight": draw(3)}, {}, "does not begin with base_model.model."),
    "a part": (low_rank() | {key(Q, "lora_C.weight"): draw(3)}, {}, "is of an unknown kind"),
    "nothing": ({}, {}, "the adapter's file has no tensors"),
    "a saved module": (None, {"modules_to_save": ["lm_head"]}, "lacks the tensors of 'lm_head'"),
    "another model": (low_rank(4, {"model.layers.2.x.weight": (4, 4)}), {}, "changes 'model.layers.2.x.weight', which"),
    "another size": (low_rank(4, {Q: (64, 96)}), {}, r"make \[64, 96\], the model's has shape \[64, 64\]"),
    "more tokens": ({key(HEAD, "weight"): draw(170, 64)}, {}, r"has shape \[170, 64\], the model's \[160, 64\]"),
    "a target": (None, {"target_modules": ["q_proj", "k_proj"]}, "lacks the tensors of 'k_proj'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_in_one_line(model: Path, tmp_path: Path, wrong: str) -> None:
    tensors, settings, said = WRONG[wrong]
    with pytest.raises(LlmcError, match=said) as caught:
        load_source(str(model), adapters=[save(tmp_path / "wrong", tensors, settings)])
    assert str(tmp_path) in str(caught.value.place)
    assert "\n" not in caught.value.fact
    assert len(caught.value.fact) < 200


def test_files_that_are_no_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "cut")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    file.write_bytes(file.read_bytes()[:-1])
    for said, damage in (
        ("the file is truncated", lambda: None),
        ("has no adapter_model.safetensors", file.unlink),
        ("pickle format", lambda: (folder / "adapter_model.bin").write_bytes(b"")),
        ("is not a JSON object", lambda: config.write_text("[]")),
        ("adapter_config.json is not JSON", lambda: config.write_text("{")),
        ("the folder has no adapter_config.json", config.unlink),
    ):
        damage()
        with pytest.raises(LlmcError, match=said):
            load_source(str(model), adapters=[folder])


def test_an_adapter_needs_a_model_with_weights(model: Path, tmp_path: Path) -> None:
    first, second = save(tmp_path / "first"), tmp_path / "second"
    with pytest.raises(LlmcError, match="does not say which model it is for"):
        load_source(str(first))
    save(second, None, {"base_model_name_or_path": "\x1b[2Jowner/name"})
    with pytest.raises(LlmcError, match="does not say which model it is for"):
        load_source(str(second))
    save(second, None, {"base_model_name_or_path": str(first)})
    with pytest.raises(LlmcError, match="the adapter is for an adapter"):
        load_source(str(second))
    with pytest.raises(LlmcError, match="cannot be merged into random weights"):
        load_source(str(model), weights="random", adapters=[first])
    with pytest.raises(LlmcError, match="no such folder: none"):
        load_source(str(model), adapters=["none"])
    with pytest.raises(LlmcError, match=r"an \.onnx file takes no adapter"):
        load_source("model.onnx", adapters=[first])

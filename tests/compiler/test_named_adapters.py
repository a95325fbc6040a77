"""Adapters that are to stay beside the weights: what they may not be is said in one line, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig

from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.adapter import read_adapter
from llmc.compiler.frontend.checkpoint import open_checkpoint
from llmc.compiler.frontend.named_adapters import NamedAdapter, added_by, find_named, parse_adapters
from llmc.runtime.errors import LlmcError
from tests.compiler.test_adapters import weights_alone
from tests.test_tiny import TINY  # whose graph is in the cache then

SaveModel = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def save(
    folder: Path, shapes: dict[str, tuple[int, int]], more: dict[str, torch.Tensor] | None = None, **said: Any
) -> Path:
    """An adapter of rank 2 for these modules [out, in]."""
    tensors = dict(more or {})
    for name, (n_out, n_in) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, n_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n_out, 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | said))
    return folder


@pytest.fixture(scope="module")
def model(save_model: SaveModel) -> Path:
    return save_model(TINY)


def test_a_name_in_front_of_a_folder_lets_an_adapter_stay(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    merged, named = parse_adapters([tmp_path / "x", f"{tmp_path}/a=b", "owner/hub=1", "sql=~/lora", "a.b-c=owner/name"])
    assert merged == [f"{tmp_path}/x", f"{tmp_path}/a=b", "owner/hub=1"]
    assert named == {"sql": "~/lora", "a.b-c": "owner/name"}


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        (["a b=x"], "an adapter's name has letters"),
        (["=x"], "an adapter's name has letters"),
        (["-a=x"], "an adapter's name has letters"),
        ([f"{'a' * 64}=x"], "at most 63"),
        (["a=x", "a=y"], "two adapters are named 'a'"),
        ([f"a{i}=x" for i in range(1025)], "at most 1024 adapters by name, not 1025"),
    ],
)
def test_names_that_nobody_could_choose_by_are_refused(given: list[str], fact: str) -> None:
    with pytest.raises(LlmcError, match=fact):
        parse_adapters(given)


def found(config: PretrainedConfig, model: Path, adapter: Path) -> NamedAdapter:
    """What an adapter changes in a model, of whose graph nothing but the weights is needed."""
    return find_named("a", read_adapter(adapter), weights_alone(config), open_checkpoint(model), is_part=False)


def test_what_is_no_pair_of_thin_matrices_is_refused(model: Path, tmp_path: Path) -> None:
    norm, table = "model.norm", "model.embed_tokens"
    magnitude = {f"base_model.model.{Q}.lora_magnitude_vector.weight": torch.ones(64)}
    sizes = {"A": (2, TINY.vocab_size), "B": (64, 2)}
    of_table = {f"base_model.model.{table}.lora_embedding_{part}": torch.ones(size) for part, size in sizes.items()}
    whole = {f"base_model.model.{norm}.weight": torch.ones(64)}
    cases = (
        (save(tmp_path / "dora", {Q: (64, 64)}, magnitude, use_dora=True), "use_dora, of .*q_proj"),
        (save(tmp_path / "table", {}, of_table), "it changes an embedding, 'model.embed_tokens.weight'"),
        (save(tmp_path / "whole", {Q: (64, 64)}, whole), "it has 'model.norm.weight' whole"),
        (save(tmp_path / "other", {"model.other": (64, 64)}), "which the model does not have"),
    )
    for folder, fact in cases:
        with pytest.raises(LlmcError, match=fact) as error:
            found(TINY, model, folder)
        assert error.value.place == str(folder)
        assert folder.name == "other" or "without a name" in str(error.value.hint)


def test_what_several_modules_share_is_refused(save_model: SaveModel, tmp_path: Path) -> None:
    config = LlamaConfig(**TINY.to_dict() | {"tie_word_embeddings": True})
    with pytest.raises(LlmcError, match="which several modules share"):
        found(config, save_model(config), save(tmp_path / "head", {"lm_head": (TINY.vocab_size, 64)}))


def test_an_expert_that_is_a_piece_of_a_weight_is_refused(save_model: SaveModel, tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_local_experts=2, vocab_size=64
    )
    config.num_attention_heads = config.num_key_value_heads = 2
    folder = save(tmp_path / "a", {"model.layers.0.block_sparse_moe.experts.1.w1": (48, 64)})
    with pytest.raises(LlmcError, match="a piece of what the model has in one"):
        found(config, save_model(config), folder)


def test_a_model_without_weights_and_a_file_are_refused(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {Q: (64, 64)})
    with pytest.raises(LlmcError, match="cannot be merged into random weights"):
        load_source(str(model), weights="random", adapters=[f"a={folder}"])
    with pytest.raises(LlmcError, match=r"an \.onnx file takes no adapter"):
        load_source(str(tmp_path / "m.onnx"), adapters=[f"a={folder}"])


def test_scale_and_names_are_the_adapters(model: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {Q: (64, 64)}, target_modules=["q_proj", "lm_head_2"])
    source = load_source(str(model), adapters=[f"sql={folder}"])
    assert source.adapters == ()
    assert source.notes == ("the adapter a names a target module that the model has not: lm_head_2",)
    [(weight, [factors])] = added_by(source.named).items()
    assert factors is not None
    assert weight == f"{Q}.weight"
    (named,) = source.named
    assert named.record["rank"] == 2
    np.testing.assert_array_equal(factors.b.unrounded(), 2 * named.changes[weight].b.read())

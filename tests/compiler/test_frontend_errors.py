"""What cannot be loaded is refused in one clear line: the fact, the place, the hint."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EsmConfig, JetMoeConfig, MambaConfig, PretrainedConfig, RwkvConfig, T5Config

from llmc.compiler.frontend import hub, load_source
from llmc.runtime.errors import LlmcError

TinyModel = Callable[[str], Path]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A good Llama folder to spoil."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def refusal(model: Path | str, **options: Any) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        load_source(str(model), **options)
    error = caught.value
    assert "\n" not in error.fact
    return error


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def write_config(folder: Path, config: PretrainedConfig, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **fields}, default=str))
    return folder


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert error.fact == f"no such folder: {tmp_path / 'nowhere'}"
    assert "llama2-7b" in str(error.hint)


def test_a_home_that_nobody_has_is_a_name_like_others() -> None:
    assert refusal("~nobody-of-this-name/some/model").fact == "no such folder: ~nobody-of-this-name/some/model"
    assert refusal("~nobody-of-this-name/some.onnx").place == "~nobody-of-this-name/some.onnx"


def test_a_name_of_bytes_that_are_no_text(folder: Path) -> None:
    name = folder.rename(folder.with_name(os.fsdecode(b"model\xff")))
    assert refusal(name).fact == "the name is no valid Unicode"


def test_a_user_whom_the_machine_does_not_know_can_compile() -> None:
    """As containers have some: such a user has no home, and TVM asks for it."""
    code = (
        "import os, pwd\npwd.getpwuid = {}.__getitem__\nimport llmc.compiler\n"
        "from pathlib import Path; assert Path.home() == Path('/nonexistent')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[2])


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert (error.fact, error.place) == ("the folder has no config.json", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json names no model_type"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": "llama", "num_hidden_layers": "two"}', "the configuration is not valid"),
        ('{"model_type": "llama", "hidden_act": "wiggle"}', "the configuration describes no model: KeyError: 'wiggle'"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "the configuration describes no model: it has no layers"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000}', "it has 1000000 layers, more than 1000"),
        ('{"model_type": "gpt_oss", "num_hidden_layers": 2147483648}', "it has 2147483648 layers, more than 1000"),
        ('{"model_type": "llama", "max_position_embeddings": -1}', "max_position_embeddings is -1"),
        ('{"model_type": "llama", "num_hidden_layers": 1, "intermediate_size": 0}', "has the shape [0, 4096]"),
        ('{"model_type": "llama", "max_position_embeddings": NaN}', "the configuration is not valid"),
        ('{"model_type": "llama", "max_position_embeddings": [1]}', "the configuration is not valid"),
        ('{"model_type": "bloom", "max_position_embeddings": [1]}', "max_position_embeddings is [1]"),
        ('{"model_type": "bloom", "n_layer": -1}', "the configuration describes no model: it has no layers"),
        ('{"model_type": "vit", "architectures": {"a": 1}}', "the architecture vit is not supported"),
        ('{"model_type": "llama", "num_attention_heads": 5}', "is not a multiple of the number of attention heads"),
    ],
)
def test_a_broken_configuration(folder: Path, text: str, fact: str) -> None:
    (folder / "config.json").write_text(text)
    assert fact in refusal(folder).fact


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_nested_too_deep_to_read(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000)
    assert name in f"{refusal(folder).fact} {refusal(folder).place}"


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + "/" + "y" * 300])
def test_a_name_too_long_for_a_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_hub_id", lambda _: False)
    assert refusal(name).fact == f"no such folder: {name}"


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    assert refusal(folder / WEIGHTS).fact == "a model is a folder, and this is a file"


def test_an_unknown_kind_of_weights(folder: Path) -> None:
    assert "'fake'" in refusal(folder, weights="fake").fact
    assert refusal(folder, task="rank").hint == "one of auto, generate, embed, classify"


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    error = refusal(folder)
    assert error.fact == "the folder has no weights"
    assert "--weights random" in str(error.hint)


def test_pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert "pickle" in error.fact
    assert "save_pretrained" in str(error.hint)


def test_a_shard_that_is_missing(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "gone-2.safetensors", "c": "gone-3"}}))
    error = refusal(folder)
    assert error.fact == "the checkpoint's file gone-2.safetensors is missing (and 1 more)"
    assert error.place == str(folder / INDEX)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert refusal(folder).place == str(folder / INDEX)


def test_a_tensor_that_is_missing(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert refusal(folder).fact == "the checkpoint lacks the tensor 'model.norm.weight'"
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(folder).fact.endswith("(and 1 more)")


def test_a_tensor_of_another_shape(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    error = refusal(folder)
    assert error.fact == "tensor 'model.norm.weight' has shape [65]; the configuration makes it [64]"
    assert error.place == str(folder / WEIGHTS)


def test_a_tensor_of_an_unsupported_dtype(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.float8_e4m3fn)}))
    assert refusal(folder).fact == "tensor 'model.norm.weight' has the unsupported dtype F8_E4M3"


def test_whole_numbers_beside_the_weights_are_left_aside(folder: Path) -> None:
    """Positions, as checkpoints of older transformers have them; but no weight may be one."""
    change(folder, lambda tensors: tensors.update({"model.position_ids": torch.arange(64)[None]}))
    assert load_source(str(folder)).dtype == "f32"
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}))
    assert refusal(folder).fact == "tensor 'model.norm.weight' has the unsupported dtype I64"


@pytest.mark.parametrize("keep", [0, 4, 8, 500, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    error = refusal(folder)
    assert "truncated" in error.fact
    assert error.place == str(folder / WEIGHTS)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": ['
        + b"9" * 4000
        + (b"," + b"9" * 4000) * 6000
        + b'], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32\\n", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"' + b"a" * 501 + b'": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [4, 8]}}',
    ],
)
def test_a_header_that_makes_no_sense(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    error = refusal(folder)
    assert error.place == str(folder / WEIGHTS)
    assert len(error.fact.splitlines()) == 1


def test_a_broken_tokenizer(folder: Path) -> None:
    merges_unknown = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}
    for text in ("{", "{}", json.dumps(merges_unknown)):
        (folder / "tokenizer.json").write_text(text)
        error = refusal(folder)
        assert error.fact.startswith("the tokenizer cannot be read")
        assert error.place == str(folder / "tokenizer.json")


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (PretrainedConfig(), {"model_type": "brandnew"}, "transformers does not know the model type 'brandnew'"),
        (PretrainedConfig(), {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "code of its own"),
        (T5Config(**{**SMALL, "num_layers": 2}), {}, "an encoder and a decoder"),
        (JetMoeConfig(**SMALL, kv_channels=16), {}, "JetMoeForCausalLM is not supported"),
        (PretrainedConfig(), {"model_type": "vit"}, "neither a causal language model nor an encoder"),
        (EsmConfig(**SMALL, pad_token_id=1), {"is_decoder": True}, "a decoder that is no causal language model"),
        (RwkvConfig(**SMALL), {}, "RwkvForCausalLM is not supported: its attention does not go through"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_architectures_that_cannot_be_compiled(
    tmp_path: Path, config: PretrainedConfig, fields: dict[str, Any], said: str
) -> None:
    error = refusal(write_config(tmp_path, config, **fields), weights="random")
    assert error.fact.startswith("the architecture ")
    assert said in error.fact


def test_labels_that_transformers_has_no_head_for(tmp_path: Path) -> None:
    folder = write_config(tmp_path, MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    error = refusal(folder, weights="random", task="classify")
    assert error.fact.endswith("is not supported: transformers has no head for labels of such a model")
    assert error.hint == "--task generate, or embed, does without"

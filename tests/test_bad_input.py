"""Bad input, end to end: one clear line with its place, exit code 1, nothing left behind."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.cli.main import main
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ArtifactFile

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=64,
)
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    path = folder.parent / "good.so"
    llmc.compile(folder, out=path, dtype="f32", batch=(1,), verify=False)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *said: str) -> None:
    assert result.exit_code == 1
    stages, found, refusal = f"\n{result.stderr}".partition("\nerror: ")
    assert found
    assert all(len(line.split(maxsplit=1)) == 2 for line in stages.splitlines() if line)
    assert len(refusal.strip().splitlines()) <= 3
    assert "Traceback" not in result.stderr
    for text in said:
        assert text in refusal


# -- models that cannot be compiled --------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def unknown_architecture(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "warpdrive", "architectures": ["Warp"]}))


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def misshapen_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 64)
    save_file(weights, folder / "model.safetensors")


def truncated_checkpoint(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_config, "config.json"),
        (unknown_architecture, "warpdrive"),
        (missing_tensor, "model.layers.0.mlp.up_proj.weight"),
        (misshapen_tensor, "95"),
        (truncated_checkpoint, "model.safetensors"),
        (only_pickles, "pickle"),
    ],
)
def test_a_spoiled_model_is_refused_by_name(folder: Path, tmp_path: Path, spoil: Spoil, said: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    assert_refused(invoke("compile", tmp_path / "model", "-o", tmp_path / "out.so"), said)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors")


def infinite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("spoil", [not_a_number, infinite])
def test_weights_that_are_no_numbers_are_blamed_on_the_model(folder: Path, tmp_path: Path, spoil: Spoil) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spoil(tmp_path / "model")
    result = invoke("compile", tmp_path / "model", "-o", tmp_path / "out.so", "--batch", "1")
    assert_refused(result, "not finite numbers", "at: model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_device_is_never_replaced_by_an_artifact(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert_refused(invoke("compile", folder, "-o", tmp_path / "pipe", "--batch", "1"), "a device or a pipe", "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_dump_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = invoke("compile", folder, "-o", tmp_path / "x.so", "--dump", tmp_path / "file")
    assert_refused(result, "--dump")
    assert "\nerror: the graph cannot be written: " in result.stderr


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert_refused(invoke("compile", tmp_path / "nowhere", "-o", tmp_path / "out.so"), "nowhere")


@pytest.mark.parametrize("arguments", [("",), ("FOLDER", "--adapter", ""), ("FOLDER", "--adapter", "sql=")])
def test_an_empty_name_is_not_the_current_folder(
    arguments: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    given = [folder if each == "FOLDER" else each for each in arguments]
    assert_refused(invoke("compile", *given, "-o", tmp_path / "out.so"), "an empty name names no folder")


def test_a_target_that_is_not_known_is_refused(folder: Path) -> None:
    assert_refused(invoke("compile", folder, "--target", "tpu"), "tpu", "cpu:x86-64-v3")


# -- artifacts that cannot be run ----------------------------------------------------------------------------------


def flip(section: str) -> Spoil:
    """Change one bit in the middle of a section."""

    def spoil(path: Path) -> None:
        with ArtifactFile.open(path) as file:
            place = file.sections[section]
        data = bytearray(path.read_bytes())
        data[place.offset + place.n_bytes // 2] ^= 1
        path.write_bytes(data)

    return spoil


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def need_missing_feature(path: Path) -> None:
    """Ask for a CPU feature that no CPU has, with all hashes right."""
    with ArtifactFile.open(path) as file:
        sections = list(file.sections.values())
    data = bytearray(path.read_bytes())
    plan = next(section for section in sections if section.name == "plan")
    header = fmt.unpack_plan_header(bytes(data[plan.offset : plan.offset + plan.n_bytes]))
    changed = fmt.pack_plan_header(header._replace(cpu_features=1 << 31))
    data[plan.offset : plan.offset + len(changed)] = changed
    digest = hashlib.sha256(data[plan.offset : plan.offset + plan.n_bytes]).digest()
    directory = b"".join(
        fmt.SECTION.pack(s.name.encode(), s.offset, s.n_bytes, digest if s is plan else s.sha256) for s in sections
    )
    trailer = fmt.TRAILER.unpack(data[-fmt.TRAILER.size :])
    data[trailer[3] : trailer[3] + len(directory)] = directory
    data[-fmt.TRAILER.size :] = fmt.TRAILER.pack(*trailer[:5], hashlib.sha256(directory).digest())
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flip("manifest"), "manifest"),
        (flip("plan"), "plan"),
        (flip("code"), "code"),
        (truncate, "truncated"),
        (empty, "artifact"),
        (need_missing_feature, "CPU feature"),
    ],
)
def test_a_spoiled_artifact_is_refused(artifact: Path, tmp_path: Path, spoil: Spoil, said: str) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy(artifact, copy)
    spoil(copy)
    assert_refused(invoke("run", copy, "--tokens", "1,2,3", "-n", 4), said, "copy.so")


def test_a_flipped_byte_in_the_weights_is_found_by_verify(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.so"
    shutil.copy(artifact, copy)
    flip("weights")(copy)
    assert_refused(invoke("verify", copy), "weights")


def test_a_token_out_of_range_is_refused(artifact: Path) -> None:
    assert_refused(invoke("run", artifact, "--tokens", "1,160", "-n", 4), "160")
    assert_refused(invoke("run", artifact, "--tokens", "1,-1", "-n", 4), "-1")


def test_a_prompt_past_the_context_is_refused(artifact: Path) -> None:
    assert_refused(invoke("run", artifact, "--tokens", ",".join(["1"] * 65), "-n", 4), "65", "64")


def test_text_for_a_model_without_a_tokenizer_is_refused(artifact: Path) -> None:
    assert_refused(invoke("run", artifact, "-p", "Once upon a time"), "tokenizer", "--tokens")

"""Small models whole, on the driver that stands in for a GPU's."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from llmc.bench.gpu import families, prepare, small_models
from llmc.bench.gpu.kit import SMALL, Kit
from llmc.compiler import driver
from llmc.compiler.target import parse_targets
from tests.bench.fake_gpu import TARGET, TINY, Made, misuse, run
from tests.emulator.build import build_library
from tests.families import ENCODERS, save, save_with_adapters
from tests.runtime.toy_cuda import build_driver


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of one model with states, an encoder, and a checkpoint that no GPU has kernels for."""
    folder = tmp_path_factory.mktemp("kit")
    for family in ("qwen3_5_text", "deepseek_v3"):
        save(family, folder / "checkpoints" / family, torch.bfloat16, max_position_embeddings=160)
    encoder, sizes = ENCODERS["modernbert"]
    save(
        encoder, folder / "checkpoints" / "modernbert", torch.bfloat16, AutoModel, max_position_embeddings=160, **sizes
    )
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        patch.setattr(driver, "WHOLE_ROWS", dict.fromkeys(driver.WHOLE_ROWS, (128, 256)))  # one text, and all of them
        small = folder / "checkpoints"
        prepare.prepare(folder / "kit", TARGET, [], carried=False, odd="none", settings=TINY, small=small)
    (folder / "kernels.so").symlink_to(build_library(list(made.kernels.values()), TARGET))
    build_driver(folder)
    return folder


def test_a_model_is_asked_in_every_way_and_says_what_float32_says(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "l")
    assert list(families.items(Kit(kit / "kit"))) == ["modernbert", "qwen3_5_text"]
    found = journal.one(families.STAGE, "qwen3_5_text")
    assert 0 < found["in a batch"] <= found["allowed"] < 0.1
    whole = journal.one(families.STAGE, "modernbert")
    assert 0 < whole["in one step"] <= whole["allowed"] < 0.1
    said = list(families.report(journal))
    assert [line.partition(" 0.")[0] for line in said] == ["- modernbert: as a text", "- qwen3_5_text: as a prompt"]
    assert misuse(tmp_path / "fake.log") == []


def test_a_model_that_says_something_else_has_failed(kit: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(kit, other, symlinks=True)
    with tarfile.open(kit / "kit" / SMALL) as file:
        file.extractall(tmp_path / "small", **families.SAFELY)
    with np.load(tmp_path / "small" / "qwen3_5_text.npz") as known:
        logits = known["logits"]
    np.savez(tmp_path / "small" / "qwen3_5_text.npz", logits=logits[..., ::-1])
    with tarfile.open(other / "kit" / SMALL, "w:xz") as file:
        file.add(tmp_path / "small", ".")
    journal = run(other, tmp_path / "out", "--stages", "l")
    error = journal.latest(families.STAGE)["qwen3_5_text"]["error"]
    assert error.startswith("ValueError: as a prompt: 1.")


def test_runs_share_items_and_one_goes_on_with_what_each_found(kit: Path, tmp_path: Path) -> None:
    shares = [run(kit, tmp_path / k, "--stages", "b", "--share", f"{k}/2") for k in "12"]
    found = [set(journal.latest("micro")) for journal in shares]
    assert all(found)
    assert not found[0] & found[1]
    resumed = [option for journal in shares for option in ("--resume", str(journal.path))]
    together = run(kit, tmp_path / "both", "--stages", "b", *resumed)
    assert {entry["item"] for entry in together.entries() if entry["stage"] == "micro"} == found[0] | found[1]
    assert len(together.entries()) == sum(len(journal.entries()) for journal in shares) + 1


def test_a_distance_is_that_of_a_typical_position() -> None:
    exact = np.random.default_rng(0).standard_normal((3, 5, 7))
    other = exact.copy()
    other[0, 0] += 100
    assert families.distance(other, exact) == 0
    other[0, 0] = np.nan
    assert np.isnan(families.distance(other, exact))


def test_texts_must_be_what_logits_say() -> None:
    class Wrong:
        """Its best token is always 3; it says others."""

        said = 3

        def tokens(self, prompt: list[int], n: int, **_: Any) -> list[int]:
            return [self.said] * n

        def logits(self, ids: list[int], adapter: str | None) -> Any:
            return np.tile(np.eye(8)[3], (len(ids), 1))

    model = Wrong()
    families.refuse_other_texts(model, [1, 2], 0.1)
    model.said = 4
    with pytest.raises(ValueError, match="with 0 guesses a token is"):
        families.refuse_other_texts(model, [1, 2], 0.1)


def test_texts_go_through_the_adapters_beside_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here in the same way on a CPU, whose bf16 is what is allowed."""
    checkpoint = save_with_adapters("llama", tmp_path / "checkpoints", 160)
    (target,) = parse_targets("cpu")
    said = small_models.add(tmp_path, "llama-adapters", checkpoint, {}, target)
    with np.load(tmp_path / "llama-adapters.npz") as known:
        exact = known["logits"].astype(np.float32)
    found = families.asked(tmp_path / "llama-adapters.so", exact, families.SLACK * said["cpu_error"])
    assert all(0 < error < 2 * said["cpu_error"] for error in found.values())
    monkeypatch.setattr(families, "adapter_of", lambda model, number: None)
    without = families.asked(tmp_path / "llama-adapters.so", exact, np.inf)
    assert min(without["as a prompt"], without["in a batch"]) > 5 * max(found.values())

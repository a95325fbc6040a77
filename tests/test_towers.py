"""What makes rows of a picture's tiles says what transformers says; other models are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmc
from llmc.cli.inspect import collect_graph, collect_summary, write_graph, write_summary
from llmc.compiler.driver import compile_model
from llmc.compiler.frontend.source import load_source
from llmc.compiler.frontend.tower import Whole, load_images
from llmc.runtime import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.families import save_adapter
from tests.pictured import PATCH, SIDE, save_processor
from tests.towers import config_of, rows_of, save_model


def tile_of(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["llava", "idefics3", "internvl"])
def test_rows_of_a_tile_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    whole = save_model(config_of(kind), tmp_path / "whole")
    how = {"images": True, "batch": (1,), "max_sequence": 32, "verify": False}
    report = compile_model(tmp_path / "whole", out=tmp_path / "model.so", **how)  # type: ignore[arg-type]
    assert report["notes"] == ["the model has no processor: it takes pixels that are prepared already, and no pictures"]
    with llmc.load(tmp_path / "model.so") as model:
        tile = tile_of(model.info.tile)
        wanted = rows_of(whole, tile)
        assert model.info.n_row == wanted.shape[1]
        with model.image(tile) as rows, model.image(tile_of(tile.shape) * 0.5), model.image(tile) as again:
            found = rows.numbers()
            assert np.array_equal(again.numbers(), found)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-6 * np.ptp(wanted)
    with ArtifactFile.open(tmp_path / "model.so") as file:
        said = write_summary(collect_summary(file))
        high, wide = tile.shape[1:]
        assert f"tiles of {wide} by {high} pixels, each of which stands for {len(wanted)} tokens" in said
        assert f"tower        {len(wanted)} rows: " in said
        assert "flatten_tile" in write_graph(collect_graph(file))


def test_a_tower_in_bf16_is_nearer_than_transformers_in_bf16(tmp_path: Path) -> None:
    whole = save_model(config_of("llava siglip"), tmp_path / "whole", torch.bfloat16)
    how = {"images": True, "batch": (1,), "max_sequence": 32, "verify": False}
    compile_model(tmp_path / "whole", out=tmp_path / "model.so", quant="int8", **how)  # type: ignore[arg-type]
    with llmc.load(tmp_path / "model.so") as model:
        tile = tile_of(model.info.tile)
        with model.image(tile) as rows:
            found = rows.numbers()
    theirs, wanted = rows_of(whole, tile), rows_of(whole.float(), tile)
    assert np.square(found - wanted).mean() < np.square(theirs - wanted).mean()


@pytest.mark.parametrize(
    ("kind", "fact"),
    [
        ("paligemma", "what tokens see where there is a picture is not what is before them and, of a picture"),
        ("llava next", "its tower takes image_sizes beside pixels"),
    ],
)
def test_other_models_are_refused_in_one_line(kind: str, fact: str, tmp_path: Path) -> None:
    config = config_of(kind)
    whole = Whole(config.to_dict(), None)
    with pytest.raises(LlmcError, match=fact) as caught:
        load_images(whole, "f32", None, None, place="here", std=0.02, seed=0)
    assert "\n" not in caught.value.fact


def test_a_tower_of_more_layers_than_any_has_is_refused() -> None:
    fields = config_of("llava").to_dict()
    fields["vision_config"]["num_hidden_layers"] = 1 << 31
    with pytest.raises(LlmcError, match="it has 2147483648 layers, more than 1000"):
        load_images(Whole(fields, None), "f32", None, None, place="here", std=0.02, seed=0)


def test_a_processor_that_counts_otherwise_is_refused(tmp_path: Path) -> None:
    config = config_of("idefics3", {"image_size": SIDE})
    config.save_pretrained(save_processor("idefics3", tmp_path, n_rows=3))
    whole, tokens = Whole(config.to_dict(), None), (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(LlmcError, match=r"makes 15 tokens, and its tower 5 times 1 rows"):
        load_images(whole, "f32", tmp_path, tokens, place="here", std=0.02, seed=0)
    save_processor("idefics3", tmp_path, n_rows=1)
    images = load_images(whole, "f32", tmp_path, tokens, place="here", std=0.02, seed=0)
    assert (images.tower.tile, images.tower.n_rows, images.notes) == ((3, SIDE, SIDE), 1, ())


def test_an_adapter_of_a_tower_is_refused(tmp_path: Path) -> None:
    whole = save_model(config_of("llava"), tmp_path / "whole")
    adapter = save_adapter(whole, tmp_path / "more", 3, ("gate_proj", "linear_1"))
    with pytest.raises(LlmcError, match="the adapter more changes more than the text part"):
        load_source(str(tmp_path / "whole"), adapters=[adapter], images=True)
    adapter = save_adapter(whole, tmp_path / "text", 3, ("gate_proj", "down_proj"))
    assert load_source(str(tmp_path / "whole"), adapters=[adapter], images=True).images is not None


def test_a_tower_whose_code_fails_is_refused_with_what_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    """Nine patches cannot be shuffled by fours; that a tile of four axes is not enough is no reason."""
    whole = Whole(config_of("idefics3", {"image_size": 3 * PATCH}).to_dict(), None)
    with pytest.raises(LlmcError, match=r"its tower failed: RuntimeError: shape '\[1, 3, 1, 96\]' is invalid"):
        load_images(whole, "f32", None, None, place="here", std=0.02, seed=0)
    assert capfd.readouterr().err == ""


def test_a_model_of_text_alone_takes_no_pictures(tmp_path: Path) -> None:
    config_of("llava").get_text_config().save_pretrained(tmp_path)
    with pytest.raises(LlmcError, match="the model takes no pictures"):
        load_source(str(tmp_path), weights="random", images=True)


def test_a_gpu_has_no_kernels_for_pictures(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="pictures have no kernels for GPUs yet"):
        compile_model(tmp_path, target="cuda:sm_90a", images=True)

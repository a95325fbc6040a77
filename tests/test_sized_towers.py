"""Towers that take pictures of any size say what transformers says; other pictures are refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, vision_utils

import llmc
from llmc.cli.inspect import collect_summary, write_summary
from llmc.compiler.driver import compile_model, picture_rows
from llmc.compiler.frontend.export import sized_tower
from llmc.compiler.frontend.export.asked_of_grid import AskedOfGrid
from llmc.compiler.frontend.export.tower import export_sized_tower
from llmc.compiler.frontend.source import load_source
from llmc.compiler.frontend.tower import Whole, load_images
from llmc.compiler.plan_tower import most_pages, pages_of
from llmc.runtime import ArtifactFile
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.format import Sized
from llmc.runtime.processor import Processor, Section
from tests.pictured import ANY_SIZE, PATCH, noise, save_processor
from tests.towers import config_of, save_model

MOST_ROWS = 256
GRIDS = ((2, 2), (4, 6), (10, 6), (8, 8), (12, 18), (2, 100), (26, 4), (16, 16), (30, 34))
"""Lines and columns of patches: of pictures that windows fit, and that cut them off."""
Patches = npt.NDArray[np.float32]


class Made(NamedTuple):
    kind: str
    whole: PreTrainedModel
    model: Model


@pytest.fixture(scope="module", params=[kind for kind in ANY_SIZE if kind != "qwen3_vl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp(request.param)
    whole = save_model(config_of(request.param), folder / "whole")
    how = {"images": True, "batch": (1,), "max_sequence": 512, "verify": False, "max_image_rows": MOST_ROWS}
    report = compile_model(folder / "whole", out=folder / "model.so", **how)  # type: ignore[arg-type]
    assert report["notes"] == ["the model has no processor: it takes pixels that are prepared already, and no pictures"]
    with llmc.load(folder / "model.so") as model:
        yield Made(request.param, whole, model)


def patches_of(grid: tuple[int, int], model: Model, seed: int = 3) -> Patches:
    shape = grid[0] * grid[1], model.info.patch
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows_of(whole: PreTrainedModel, patches: Patches, grid: tuple[int, int]) -> Patches:
    """What transformers makes of them: float32 [n, d]."""
    with torch.no_grad():
        features: Any = whole.get_image_features(torch.from_numpy(patches), torch.tensor([[1, *grid]]))
    rows: Patches = torch.cat(tuple(features.pooler_output)).numpy()
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rows_of_a_picture_of_any_size_are_those_of_transformers(made: Made, grid: tuple[int, int]) -> None:
    patches = patches_of(grid, made.model)
    wanted = rows_of(made.whole, patches, grid)
    with (
        made.model.picture(patches, grid) as rows,
        made.model.picture(patches_of((32, 32), made.model, seed=4), (32, 32)),
        made.model.picture(patches, grid) as again,
    ):
        found = rows.numbers()
        assert np.array_equal(again.numbers(), found), "whatever picture was there before"
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-6 * np.ptp(wanted)


def test_an_artifact_says_how_large_pictures_may_be(made: Made) -> None:
    info = made.model.info
    assert (info.patch, info.merge, info.most_rows, info.tile) == (3 * 2 * PATCH**2, 2, MOST_ROWS, (0, 0, 0))
    with ArtifactFile.open(made.model.path) as file:
        said = write_summary(collect_summary(file))
    assert f"of any size, which stand for up to {MOST_ROWS} tokens" in said


@pytest.mark.parametrize(
    ("n", "grid", "fact"),
    [
        (34 * 34, (34, 34), "a picture of 289 rows is larger than the artifact takes, 256"),
        (3 * 4, (3, 4), "a picture of 3 by 4 patches has no rows of 2 by 2"),
        (5, (2, 2), r"a picture of 2 by 2 patches is not an array \[5, 1176\]"),
        (0, (0, 2), r"a picture of 0 by 2 patches is not an array \[0, 1176\]"),
    ],
)
def test_other_pictures_are_refused(made: Made, n: int, grid: tuple[int, int], fact: str) -> None:
    with pytest.raises(LlmcError, match=fact):
        made.model.picture(np.zeros((n, made.model.info.patch), np.float32), grid)
    assert made.model.info.n_rows == 0


def test_a_strip_that_has_more_windows_than_there_is_room_for_is_refused(made: Made) -> None:
    strip = 2, 2 * MOST_ROWS
    if made.kind == "qwen2_5_vl":
        with pytest.raises(LlmcError, match="a picture of 1 by 256 rows has more windows than there is room for"):
            made.model.picture(patches_of(strip, made.model), strip)
    else:
        made.model.picture(patches_of(strip, made.model), strip).close()


def test_a_tile_is_no_picture_of_any_size(made: Made) -> None:
    with pytest.raises(LlmcError, match="takes patches of pictures of any size, and no tiles"):
        made.model.image(np.zeros((3, 56, 56), np.float32))


# -- what is compiled --------------------------------------------------------------------------------------------------


def test_a_picture_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    config = config_of("qwen2_vl")
    config.save_pretrained(save_processor("qwen2_vl", tmp_path))
    images = load_source(str(tmp_path), weights="random", images=True, max_image_rows=64).images
    assert images is not None
    assert images.processor is not None
    prepare = Processor(Section.read(images.processor), (tmp_path / "tokenizer.json").read_text(), "here")
    for size in ((2000, 1500), (1500, 40)):
        made = prepare(noise(*size))
        assert made.grid is not None
        lines, columns = made.grid
        assert made.tiles.shape == (lines * columns, 3 * 2 * PATCH**2)
        assert 40 <= lines * columns // 4 == made.ids.count(images.tower.image_token) <= 64


def test_a_limit_of_rows_is_checked(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="pictures of up to 63 rows") as caught:
        compile_model(tmp_path, images=True, max_image_rows=63)
    assert caught.value.hint == "between 64 and 16384"


def test_a_processor_that_makes_other_patches_is_refused(tmp_path: Path) -> None:
    config = config_of("qwen2_vl", {"temporal_patch_size": 1})
    config.save_pretrained(save_processor("qwen2_vl", tmp_path))
    whole, tokens = Whole(config.to_dict(), None), (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(
        LlmcError, match=r"patches of 1176 numbers, and \d+ tokens of them: its tower takes patches of 588"
    ):
        load_images(whole, "f32", tmp_path, tokens, place="here", std=0.02, seed=0)


def test_plans_are_of_whole_cache_lines_and_rise() -> None:
    assert picture_rows(200, 2) == [64, 128, 192, 200]
    assert picture_rows(65, 1) == [64, 80]
    assert picture_rows(64, 2) == [64]


def test_pages_are_enough_for_every_picture_that_is_not_too_narrow() -> None:
    sized = Sized(patch=1, merge=2, window=4)
    most = most_pages(sized, 100)
    for lines in range(1, 101):
        for columns in range(1, 100 // lines + 1):
            assert pages_of(sized, lines, columns) <= most
    assert most_pages(sized._replace(window=0), 100) == 7


# -- what a tower may ask ----------------------------------------------------------------------------------------------


def asked_of(n_patches: int = 24) -> AskedOfGrid:
    return AskedOfGrid(torch.nn.Module(), n_patches, FakeTensorMode())


def test_what_nobody_answers_is_refused() -> None:
    with pytest.raises(LlmcError, match="its tower asks get_vision_cu_seqlens_of_others of a picture's grid"):
        asked_of().answering(get_vision_cu_seqlens_of_others)(torch.tensor([[1, 4, 6]]))


def get_vision_cu_seqlens_of_others(grid_thw: torch.Tensor) -> None:
    """What a later transformers might have."""


def test_what_is_asked_twice_is_of_one_size() -> None:
    ask, grid = asked_of().answering(vision_utils.get_vision_position_ids), torch.tensor([[1, 4, 6]])
    assert ask(grid, 2) is ask(grid, 2)
    with pytest.raises(LlmcError, match="its tower asks get_vision_position_ids twice, of different sizes"):
        ask(grid, 1)
    with pytest.raises(LlmcError, match="its tower's patches have positions in three directions"):
        asked_of().answering(vision_utils.get_vision_position_ids)(grid, 2, include_temporal=True)


def test_a_tower_that_works_with_a_pictures_height_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives other rows for a picture that is turned, of as many patches."""
    made = sized_tower.rows_of_picture
    monkeypatch.setattr(sized_tower, "rows_of_picture", lambda whole, x, grid: made(whole, x, grid) * grid[0])
    config = config_of("qwen2_vl")
    with pytest.raises(LlmcError, match="its tower asks for a picture's height and width itself") as caught:
        export_sized_tower(config, config.image_token_id)
    assert caught.value.hint == "without --images its text part is compiled alone"

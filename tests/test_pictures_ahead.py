"""Pictures whose rows see each other both ways, from a checkpoint on: what transformers makes of them, the same bits in
any chunks and company, and what would cut a picture refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import llmc
from llmc.compiler.driver import compile_model, with_picture
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.given import Given
from tests.runtime.serve.served import Served
from tests.towers import config_of, save_model

Rows = npt.NDArray[np.float32]
N_ROWS = 49
"""Of a tile: more than a window, and more than a small step has."""
WORDS = [int(token) for token in np.random.default_rng(1).integers(3, 50, 24)]


class Made:
    """A model of transformers whose pictures are longer than its window, and its artifact."""

    def __init__(self, folder: Path) -> None:
        config = config_of("gemma3")
        config.vision_config.image_size, config.mm_tokens_per_image = 14 * 7, N_ROWS
        config.text_config.layer_types = ["sliding_attention", "full_attention"]
        self.token, self.path = config.image_token_index, folder / "model.so"
        self.source = save_model(config, folder / "model")
        report = compile_model(folder / "model", out=self.path, images=True, batch=(1,), max_sequence=160)
        self.certificate = report["certificate"]

    def logits(self, tiles: Rows, ids: list[int]) -> Rows:
        """What transformers says of a text with the picture's token in its rows' places."""
        text = torch.tensor([ids])
        types = (text == self.token).long()
        with torch.no_grad():
            said: Any = self.source(input_ids=text, pixel_values=torch.from_numpy(tiles), token_type_ids=types)
        return np.asarray(said.logits[0].numpy())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("ahead"))


@pytest.fixture
def model(made: Made) -> Iterator[Model]:
    with llmc.load(made.path, kv_tokens=1024) as opened:
        yield opened


@pytest.fixture
def tiles(model: Model) -> Rows:
    """Two pictures, of one tile each."""
    return np.random.default_rng(3).normal(size=(2, *model.info.tile)).astype(np.float32)


@pytest.fixture
def rows(model: Model, tiles: Rows) -> list[Given]:
    return [model.image(tile) for tile in tiles]


def text_of(one: list[int], other: list[int]) -> list[int]:
    return [*WORDS[:5], *one, *WORDS[5:8], *other, *WORDS[8:]]


def test_a_picture_is_what_transformers_makes_of_it(made: Made, model: Model, tiles: Rows, rows: list[Given]) -> None:
    assert model.info.picture_rows == model.info.n_tile_rows == N_ROWS
    found = model.logits(text_of(list(rows[0].ids), list(rows[1].ids)))
    wanted = made.logits(tiles, text_of([made.token] * N_ROWS, [made.token] * N_ROWS))
    assert np.abs(found - wanted).max() <= 2e-4 * np.ptp(wanted)


def test_it_is_certified(made: Made) -> None:
    assert made.certificate["status"] == made.certificate["images"]["status"] == "passed"
    assert made.certificate["images"]["prompts"]


def test_it_is_the_masks_that_make_the_difference(made: Made, tiles: Rows) -> None:
    ids = text_of([made.token] * N_ROWS, [made.token] * N_ROWS)
    with torch.no_grad():
        text, none = torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long)
        said: Any = made.source(input_ids=text, pixel_values=torch.from_numpy(tiles), token_type_ids=none)
    wanted = made.logits(tiles, ids)
    assert np.abs(said.logits[0].numpy() - wanted).max() > 0.05 * np.ptp(wanted)


def test_bits_do_not_depend_on_company_and_chunks(model: Model, rows: list[Given]) -> None:
    one, other = list(rows[0].ids), list(rows[1].ids)
    text = text_of(one, other)
    whole, plain = model.logits(text), model.logits(WORDS)
    first, second = 5 + N_ROWS, 8 + 2 * N_ROWS
    with model.sequence() as sequence, model.sequence() as beside:
        sequence.feed(text[:4])
        model.step([(beside, WORDS[:20]), (sequence, text[4:first])])  # 19 tokens in front of a picture's end
        np.testing.assert_array_equal(sequence.logits(), whole[first - 1])
        with sequence.fork() as fork:
            model.step([(sequence, text[first : first + 2]), (beside, WORDS[20:]), (fork, text[first:second])])
            np.testing.assert_array_equal(fork.logits(), whole[second - 1])
            np.testing.assert_array_equal(fork.feed_for_logits(text[second:]), whole[second:])
        np.testing.assert_array_equal(beside.logits(), plain[-1])
        np.testing.assert_array_equal(sequence.feed_for_logits(text[first + 2 :]), whole[first + 2 :])


def test_a_picture_is_not_cut(model: Model, rows: list[Given]) -> None:
    one, other = list(rows[0].ids), list(rows[1].ids)
    text = [*WORDS[:5], *one, *other, *WORDS[5:]]
    with model.sequence() as sequence:
        for part in (one[:3], one[3:], [*one[:5], WORDS[0], *one[5:]], one[::-1], [*one[1:], one[0]]):
            with pytest.raises(LlmcError, match="of a picture of 49 stands for token"):
                sequence.feed(part)
        assert sequence.length == 0
        sequence.feed(text)
        assert (sequence.cut(60), sequence.length) == (5 + N_ROWS, 5 + N_ROWS)
        assert sequence.cut(6) == 5
        np.testing.assert_array_equal(sequence.feed_for_logits(text[5:]), model.logits(text)[5:])


def test_a_picture_that_a_text_has_no_room_for_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="a picture becomes 49 tokens, which see each other, and a text has 48"):
        compile_model(made.path.parent / "model", out=tmp_path / "m.so", images=True, max_sequence=48)


def test_a_step_has_room_for_a_picture_and_what_is_beside_it(model: Model) -> None:
    assert model.info.max_step_tokens == 128
    assert N_ROWS + 32 in [plan["rows"] for plan in model.manifest["plans"] if plan["kind"] == "body"]
    source: Any = SimpleNamespace(n_context=100, images=SimpleNamespace(tower=SimpleNamespace(n_rows=80)))
    assert with_picture([32], source) == [32, 100]


def test_a_server_cuts_no_picture(model: Model, rows: list[Given]) -> None:
    """Chunks are shorter than a picture, and pages end within one; a prompt may end with one."""
    one, other = list(rows[0].ids), list(rows[1].ids)
    texts = [[*WORDS[:5], *one, *part] for part in (WORDS[5:9], [*other, *WORDS[:3]], [])]
    texts += [WORDS[:7], [*WORDS[:20], *other, *WORDS[:9]]]
    wanted = [model.tokens(text, 6, ignore_eos=True) for text in texts]
    served = Served(model, max_batch=3, chunk=4)
    for _ in range(2):
        jobs = [served.job(text) for text in texts]
        served.submit(*jobs)
        served.finish(*jobs)
        assert [job.ids[len(text) :] for job, text in zip(jobs, texts, strict=True)] == wanted
    served.leave()
    assert [job.n_reused for job in jobs] == [0, 5 + 2 * N_ROWS, 0, 0, 20 + N_ROWS], "to the end of pictures"

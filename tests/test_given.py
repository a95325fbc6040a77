"""Rows in the place of tokens' embeddings, from a checkpoint on: what transformers makes of `inputs_embeds`, and the
same bits in any chunks and company."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmc
from llmc.compiler import driver
from llmc.compiler.frontend import load_source
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model
from tests.families import save

Rows = npt.NDArray[np.float32]
IDS = [int(token) for token in np.random.default_rng(1).integers(3, 160, 32)]
PLACES = [0, 5, 6, 7, 8, 21, 31]
"""Of tokens that rows stand for."""


class Made:
    """A model of transformers, and the artifact that takes rows."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder, self.path = save(family, folder / "model"), folder / "model.so"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "load_source", partial(load_source, rows=True))
            options: dict[str, Any] = {"batch": (1,), "max_sequence": 32}  # as test_families.py compiles it
            report = llmc.compile(self.folder, out=self.path, **options)
        assert report["certificate"]["status"] == "passed"
        self.source = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        with torch.no_grad():
            self.embedded: Rows = self.source.get_input_embeddings()(torch.tensor([IDS]))[0].numpy()
        draws = np.random.default_rng(2).normal(0, self.embedded.std(), (len(PLACES), self.embedded.shape[1]))
        self.rows = draws.astype(np.float32)

    def logits(self) -> Rows:
        """What transformers says of IDS with rows in their places."""
        rows = self.embedded.copy()
        rows[PLACES] = self.rows
        with torch.no_grad():
            return np.asarray(self.source(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy())


@pytest.fixture(scope="module", params=["gemma3_text", "qwen3_5_text"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model whose embeddings have a scale, and one with states."""
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(made: Made) -> Iterator[Model]:
    with llmc.load(made.path, kv_tokens=512, slots=6) as opened:
        yield opened


def with_rows(ids: range) -> list[int]:
    """IDS with rows in their places."""
    text = list(IDS)
    for place, row in zip(PLACES, ids, strict=True):
        text[place] = row
    return text


def test_rows_are_what_transformers_calls_inputs_embeds(made: Made, model: Model) -> None:
    assert model.info.n_row == model.manifest["memory"]["row_bytes"] // 4 == made.rows.shape[1]
    with model.rows(made.rows) as given:
        wanted, found = made.logits(), model.logits(with_rows(given.ids))
    assert np.abs(found - wanted).max() <= 2e-4 * np.ptp(wanted)
    assert np.abs(found - model.logits(IDS)).max() > 0.05 * np.ptp(wanted)


def test_a_row_that_is_a_tokens_embedding_changes_no_bit(made: Made, model: Model) -> None:
    with model.rows(made.embedded) as given:
        np.testing.assert_array_equal(model.logits([*IDS[:9], *given.ids[9:]]), model.logits(IDS))


def test_bits_do_not_depend_on_company_and_chunks(made: Made, model: Model) -> None:
    with model.rows(made.rows) as given:
        text = with_rows(given.ids)
        whole = model.logits(text)
        with model.sequence() as one, model.sequence() as other:
            parts = [one.feed_for_logits(part) for part in (text[:6], text[6:7], text[7:25])]
            with one.fork() as fork:
                other.feed(IDS[:3])
                model.step([(other, IDS[3:9]), (fork, text[25:]), (one, IDS[25:])])
                np.testing.assert_array_equal(fork.logits(), whole[-1])
            np.testing.assert_array_equal(other.logits(), model.logits(IDS[:9])[-1])
            np.testing.assert_array_equal(np.concatenate(parts), whole[:25])


def test_what_takes_tokens_alone_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(LlmcError, match=r"an \.onnx file takes tokens alone"):
        load_source(str(tmp_path / "model.onnx"), rows=True)
    with pytest.raises(LlmcError, match="images are for models that write texts"):
        load_source(str(made.folder), task="embed", rows=True)

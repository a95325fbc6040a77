"""Positions in three directions, from a checkpoint on: what a whole model of transformers makes of rows that lie in
lines and columns, and the same bits in any chunks and company."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

import llmc
from llmc.compiler import driver
from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.export.grids_in_text import check_grids
from llmc.compiler.frontend.export.tower import build_whole
from llmc.compiler.frontend.quiet import quiet
from llmc.runtime import LlmcError
from llmc.runtime.binding import Model

Rows = npt.NDArray[np.float32]
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 128,
}
MERGE = 2
VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "out_hidden_size": 64, "spatial_merge_size": MERGE}
SECTIONS = {"qwen2_5_vl": [2, 3, 3], "qwen3_5": [2, 1, 1], "qwen3_vl": [4, 2, 2]}
"""Of the angles: those of time, lines and columns side by side, and in turns."""
OF_QWEN3_5 = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
DEEP = {"qwen2_5_vl": 0, "qwen3_5": 0, "qwen3_vl": 2}
"""Layers that rows add to."""
IMAGE = 150
GRIDS = [(3, 2), (1, 1), (2, 5)]
"""Lines and columns of pictures' rows."""


def config_of(kind: str) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e3, "mrope_section": SECTIONS[kind]}
    rope |= {"partial_rotary_factor": 0.5} if kind == "qwen3_5" else {}
    text = TEXT | {"rope_parameters": rope} | (OF_QWEN3_5 if kind == "qwen3_5" else {})
    text |= {"num_hidden_layers": 1 + DEEP[kind]} if DEEP[kind] else {}
    return CONFIG_MAPPING[kind](text_config=text, vision_config=VISION, image_token_id=IMAGE)


def whole_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with quiet():
        config = config_of(kind)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    return model


class Text(NamedTuple):
    """ids: with IMAGE in the place of each row.  places: where pictures begin."""

    ids: list[int]
    places: list[int]

    def fed(self, pictures: list[range]) -> list[int]:
        """With the numbers of rows in their places."""
        ids = list(self.ids)
        for place, rows in zip(self.places, pictures, strict=True):
            ids[place : place + len(rows)] = rows
        return ids


def interleaved() -> Text:
    """Pictures at the beginning, among tokens, and two side by side but for what transformers marks pictures by."""
    draws = np.random.default_rng(1)
    ids, places = list[int](), list[int]()
    for (height, width), n_behind in zip(GRIDS, (4, 1, 6), strict=True):
        places.append(len(ids))
        ids += [*[IMAGE] * (height * width), *draws.integers(3, 140, n_behind).tolist()]
    return Text(ids, places)


class Made:
    """A model of transformers, its text with rows of one's own in it, and the artifact."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path, self.whole = kind, folder / "model.so", whole_model(kind)
        self.whole.save_pretrained(folder / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "load_source", partial(load_source, rows=True, turned=True, deep=DEEP[kind]))
            options: dict[str, Any] = {"batch": (1,), "max_sequence": 64}
            report = llmc.compile(folder / "model", out=self.path, **options)
        assert report["certificate"]["status"] == "passed"
        self.text = interleaved()
        draws = np.random.default_rng(2)
        size = (1 + DEEP[kind]) * TEXT["hidden_size"]
        self.rows = [draws.normal(0, 1, (h * w, size)).astype(np.float32) for h, w in GRIDS]

    def wanted(self, ids: list[int], grids: list[tuple[int, int]]) -> Rows:
        """What the whole says of ids with its first pictures in them, at the positions that it counts itself."""
        tokens = torch.tensor([ids])
        thw = torch.tensor([[1, MERGE * height, MERGE * width] for height, width in grids])
        with torch.no_grad():
            embedded = self.whole.get_input_embeddings()(tokens)
            rows = torch.from_numpy(np.concatenate(self.rows[: len(grids)]))
            embedded[0, tokens[0] == IMAGE], *deep = rows.chunk(1 + DEEP[self.kind], dim=-1)
            types = (tokens == IMAGE).long()
            positions, _ = self.whole.model.get_rope_index(tokens, image_grid_thw=thw, mm_token_type_ids=types)
            told = {"visual_pos_masks": tokens == IMAGE, "deepstack_visual_embeds": deep} if deep else {}
            hidden = self.whole.model.language_model(inputs_embeds=embedded, position_ids=positions, **told)
            logits = self.whole.lm_head(hidden.last_hidden_state)
        return np.asarray(logits[0].numpy())


@pytest.fixture(scope="module", params=sorted(SECTIONS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(made: Made) -> Iterator[Model]:
    with llmc.load(made.path, kv_tokens=512, slots=6) as opened:
        yield opened


@pytest.fixture
def fed(made: Made, model: Model) -> Iterator[list[int]]:
    """The text, as the artifact is fed it."""
    given = [model.rows(rows, grid) for rows, grid in zip(made.rows, GRIDS, strict=True)]
    yield made.text.fed([each.ids for each in given])
    for each in given:
        each.close()


def test_rows_are_at_the_positions_that_transformers_counts(made: Made, model: Model, fed: list[int]) -> None:
    wanted, found = made.wanted(made.text.ids, GRIDS), model.logits(fed)
    assert np.abs(found - wanted).max() <= 2e-4 * np.ptp(wanted)
    with model.rows(np.concatenate(made.rows)) as plain:  # at a text's positions they say something else
        parts = np.split(np.array(plain.ids), np.cumsum([len(rows) for rows in made.rows])[:-1])
        ids = made.text.fed([range(part[0], part[-1] + 1) for part in parts])
        assert np.abs(found - model.logits(ids)).max() > 0.01 * np.ptp(wanted)


def test_a_text_without_pictures_has_its_bits(made: Made, model: Model) -> None:
    """Those of the text part compiled by itself."""
    if made.kind != "qwen2_5_vl":
        return
    alone, ids = made.path.with_name("alone.so"), [id for id in made.text.ids if id != IMAGE]
    llmc.compile(made.path.with_name("model"), out=alone, batch=(1,), max_sequence=64, verify=False)
    with llmc.load(alone) as plain:
        np.testing.assert_array_equal(model.logits(ids), plain.logits(ids))


def test_bits_do_not_depend_on_company_and_chunks(made: Made, model: Model, fed: list[int]) -> None:
    whole = model.logits(fed)
    with model.sequence() as one, model.sequence() as other:
        parts = [one.feed_for_logits(part) for part in (fed[:4], fed[4:5], fed[5:15])]  # the last one is cut as well
        with one.fork() as fork:
            other.feed(fed[:3])
            model.step([(other, fed[3:9]), (fork, fed[15:]), (one, fed[15:])])
            np.testing.assert_array_equal(fork.logits(), whole[-1])
        np.testing.assert_array_equal(other.logits(), model.logits(fed[:9])[-1])
        np.testing.assert_array_equal(np.concatenate(parts), whole[:15])


def test_the_reference_counts_as_the_whole_does(made: Made) -> None:
    """It is the text part alone, and fills shorter prompts up."""
    source = load_source(str(made.path.with_name("model")), rows=True, turned=True, deep=DEEP[made.kind])
    first, (height, width) = TEXT["vocab_size"], GRIDS[0]
    ids = [5, 6, *[IMAGE] * (height * width), 7, 8, 9]
    prompts = [[5, 6, *range(first, first + height * width), 7, 8, 9], [4]]
    found, _ = reference_logits(source, prompts, given=(first, made.rows[0]), grid=GRIDS[0])
    wanted = made.wanted(ids, GRIDS[:1])
    assert np.abs(found - wanted).max() <= 1e-5 * np.ptp(wanted)


def test_how_a_model_counts_is_seen_by_running_it() -> None:
    model = build_whole(config_of("qwen2_5_vl"))
    assert check_grids(model, IMAGE, MERGE) == (True, False)
    inner = model.model
    own = inner.get_vision_position_ids
    for wrong in (
        lambda *given, **more: own(*given, **more)[[0, 2, 1]],  # columns first
        lambda begin, *given, **more: own(begin + 1, *given, **more),
    ):
        inner.get_vision_position_ids = wrong
        with pytest.raises(LlmcError, match="a picture's rows have positions of their own"):
            check_grids(model, IMAGE, MERGE)
    inner.get_vision_position_ids = own
    assert check_grids(model, IMAGE, MERGE) == (True, False)


def test_rows_that_go_into_later_layers_do_so_behind_the_first_ones() -> None:
    whole = build_whole(config_of("qwen3_vl"))
    assert check_grids(whole, IMAGE, MERGE) == (True, True)
    text = whole.model.language_model
    own = text._deepstack_process
    for wrong in (
        lambda hidden, mask, rows: own(hidden, mask, 2 * rows),
        lambda hidden, mask, rows: hidden + rows.sum(),
        lambda hidden, mask, rows: hidden,
    ):
        text._deepstack_process = wrong
        with pytest.raises(LlmcError, match="rows go into later layers elsewhere than behind the first ones"):
            check_grids(whole, IMAGE, MERGE)

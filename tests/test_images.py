"""Small models that take pictures, from configurations to tokens: what transformers says of the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

import llmc
from llmc.runtime.binding import Model
from llmc.runtime.conversation import Conversation
from tests.pictured import MARKS, SIDE, noise, save_processor, token_of
from tests.towers import config_of, save_model


class Made(NamedTuple):
    kind: str
    whole: PreTrainedModel
    model: Model
    folder: Path


@pytest.fixture(scope="module", params=MARKS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A model in float32, its certificate passed."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = save_model(config_of(request.param), folder)
    save_processor(request.param, folder, side=2 * SIDE)
    report = llmc.compile(folder, out=folder / "model.so", images=True, batch=(1, 2))
    assert report["certificate"]["status"] == "passed"
    assert report["notes"] == []
    with llmc.load(folder / "model.so") as model:
        yield Made(request.param, whole, model, folder)


def said(made: Made, text: str, pictures: list[Image.Image], n: int) -> list[int]:
    """Transformers' greedy tokens; its own processor has prepared the prompt whole."""
    processor: Any = made.model.images.processor.whole
    inputs = processor(text=[text], images=pictures, return_tensors="pt", text_kwargs={"add_special_tokens": False})
    with torch.no_grad():
        whole: Any = made.whole
        ids = whole.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=-1)
    return [int(token) for token in ids[0, inputs["input_ids"].shape[1] :]]


@pytest.mark.parametrize("sizes", [[(100, 60)], [(40, 120), (56, 56)]], ids=["one", "two"])
def test_tokens_are_those_of_transformers(made: Made, sizes: list[tuple[int, int]]) -> None:
    mark = MARKS[made.kind]
    text = f"See {mark} and {mark}?" if len(sizes) == 2 else f"See {mark}?"
    pictures = [noise(*size, seed=size[0]) for size in sizes]
    wanted = said(made, text, pictures, 12)
    assert made.model.tokens(text, 12, images=pictures, ignore_eos=True) == wanted
    assert made.model.tokens(text, 12, images=pictures, ignore_eos=True, speculate=3) == wanted
    shown, others = (made.model.images.read(text, each) for each in (pictures, [noise(80, 80)] * len(sizes)))
    logits, other = (made.model.logits(each.ids)[-1] for each in (shown, others))
    assert np.abs(logits - other).max() > 0.02 * np.ptp(logits)


@pytest.mark.parametrize("form", ["{0}Why?", "See\n{0} and\n\n{0}", "{0}\n\n\n{0}{0}\n"])
def test_a_prompt_has_the_tokens_that_the_processor_gives_it(made: Made, form: str) -> None:
    text, token = form.format(MARKS[made.kind]), token_of(made.kind)
    pictures = [noise(70, 40, seed=seed) for seed in range(text.count(MARKS[made.kind]))]
    processor: Any = made.model.images.processor
    ids = [min(each, made.model.info.n_ids) for each in made.model.images.read(text, pictures).ids]
    assert [token if each == made.model.info.n_ids else each for each in ids] == [
        *processor.prepare(text, pictures).ids
    ]


def test_a_conversation_is_that_of_transformers(made: Made) -> None:
    pictures = [noise(100, 60, seed=1), noise(56, 56, seed=2)]
    talk, parts = list[dict[str, Any]](), list[list[dict[str, Any]]]()
    with Conversation(made.model) as ours:
        for question, picture in zip(("What?", "And?"), pictures, strict=True):
            answer = "".join(piece.answer for piece in ours.ask(question, 6, images=[picture]))
            parts.append([{"type": "image"}, {"type": "text", "text": question}])
            talk.append({"role": "user", "content": parts[-1]})
            processor: Any = made.model.images.processor.whole
            text = processor.apply_chat_template(
                talk, (made.folder / "chat_template.jinja").read_text(), add_generation_prompt=True
            )
            assert ours.generation is not None
            wanted = said(made, text, pictures[: len(parts)], len(ours.generation.tokens))
            assert ours.generation.tokens == wanted
            talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})

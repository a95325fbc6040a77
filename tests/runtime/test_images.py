"""Pictures in prompts, in Python: the rows in their places, kept once, and given back."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llmc
from llmc.runtime import images
from llmc.runtime.binding import Model
from llmc.runtime.conversation import Conversation
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY
from llmc.runtime.pictures import Picture
from tests.pictured import noise
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_pictured
from tests.runtime.stub_artifact import write_stub
from tests.runtime.toy_given import TILE_ROWS
from tests.runtime.toy_pictured import TOKEN, answer

RED, BLUE = noise(4, 2, seed=1), noise(4, 2, seed=2)


@pytest.fixture(scope="module")
def pictured_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pictured.build_artifact(tmp_path_factory.mktemp("pictured"))


@pytest.fixture
def model(pictured_so: Path) -> Iterator[Model]:
    with llmc.load(pictured_so, threads=1) as model:
        yield model


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def said(model: Model, prompt: object, *pictures: object, n: int = 5) -> list[int]:
    return model.tokens(prompt, n, ignore_eos=True, images=pictures)  # type: ignore[arg-type]


def test_a_pictures_rows_stand_in_the_place_of_its_mark(model: Model, tmp_path: Path) -> None:
    assert model.takes_images
    wanted = answer(model, "ab<image>c", [RED], 5)
    assert wanted != answer(model, "ab<image>c", [BLUE], 5)
    (tmp_path / "red.png").write_bytes(png(RED))
    for given in (RED, np.asarray(RED), png(RED), tmp_path / "red.png"):
        assert said(model, "ab<image>c", given) == wanted
    ids = model.encode("ab<image>c", special=False)
    assert said(model, ids, RED) == wanted
    text = "".join(model.generate("ab<image>c", 5, ignore_eos=True, images=[RED]))
    assert text == model.decode(wanted, after=ids[-1:])


def test_several_stand_in_their_order(model: Model) -> None:
    text = "<image>a<image><image>b"
    assert said(model, text, RED, BLUE, RED) == answer(model, text, [RED, BLUE, RED], 5)


def test_a_text_without_marks_has_its_pictures_before_it(model: Model) -> None:
    assert said(model, "abc", RED, BLUE) == answer(model, "<image>\n<image>\nabc", [RED, BLUE], 5)


def test_the_same_picture_is_kept_once_and_guesses_do_not_name_its_rows(model: Model) -> None:
    first = model.images.prompt([5, TOKEN, TOKEN, 6], [*map(model_picture, (RED, RED))])
    assert first.ids[1 : 1 + TILE_ROWS] == first.ids[1 + TILE_ROWS : 1 + 2 * TILE_ROWS]
    assert min(first.ids[1 : 1 + TILE_ROWS]) >= model.info.n_ids
    assert model.info.n_rows == TILE_ROWS
    said(model, "ab<image>", RED)
    assert model.info.n_rows == TILE_ROWS
    assert model.tokens(first.ids, 5, ignore_eos=True, speculate=4) == model.tokens(first.ids, 5, ignore_eos=True)


def model_picture(picture: Image.Image) -> Picture:
    return Picture.of(picture)


def test_rows_that_no_prompt_has_any_more_are_given_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_KEPT_BYTES", 2 * TILE_ROWS * 4 * toy.CHANNELS)
    pictures = [noise(4, 2, seed) for seed in range(5)]
    stream = model.stream("<image>a", 8, GREEDY, ignore_eos=True, images=pictures[:1])
    wanted = answer(model, "<image>a", pictures[:1], 8)
    for picture in pictures[1:]:
        said(model, "<image>b", picture)
    gc.collect()
    assert model.info.n_rows == 3 * TILE_ROWS  # two are kept, and one is waited for
    assert list(stream) == wanted
    del stream
    gc.collect()
    assert model.info.n_rows == 2 * TILE_ROWS
    said(model, "<image>b", pictures[4])
    assert model.info.n_rows == 2 * TILE_ROWS


@pytest.mark.parametrize(
    ("prompt", "n", "fact"),
    [
        ("ab<image>", 2, r"the prompt has 1 place for pictures \(<image>\), and 2 are given"),
        ("<image>a<image>", 1, r"the prompt has 2 places for pictures \(<image>\), and 1 is given"),
        ([3, 4], 1, r"the prompt has 0 places for pictures"),
        ("a<image>", 0, r"the prompt has 1 place for pictures \(<image>\), and none is given"),
    ],
)
def test_as_many_pictures_are_given_as_there_are_places(model: Model, prompt: object, n: int, fact: str) -> None:
    with pytest.raises(LlmcError, match=fact):
        said(model, prompt, *[RED] * n)


def test_a_prompt_that_is_too_long_is_refused_before_its_pictures_are_read(model: Model) -> None:
    text = "<image>" * 9 + "a" * (toy.CONTEXT - 9 * TILE_ROWS)
    assert len(said(model, text, *[RED] * 9, n=1)) == 1
    with pytest.raises(LlmcError, match=f"the text is {toy.CONTEXT + 1} tokens long"):
        said(model, text + "a", *[BLUE] * 9)
    assert model.info.n_rows == TILE_ROWS


def test_a_picture_that_cannot_be_read_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="this is no picture") as caught:
        said(model, "a", RED, b"x")
    assert caught.value.place == "picture 2"
    (tmp_path / "x.png").write_bytes(png(RED)[:60])
    with pytest.raises(LlmcError, match="damaged") as caught:
        said(model, "a", tmp_path / "x.png")
    assert caught.value.place == str(tmp_path / "x.png")


def test_a_prompt_with_pictures_is_not_kept_in_a_file(model: Model, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="a prompt with pictures is not kept in a file"):
        model.tokens("a", 3, images=[RED], prompt_cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_texts_takes_no_pictures(tmp_path: Path) -> None:
    with llmc.load(write_stub(tmp_path / "stub.so")) as model:
        assert not model.takes_images
        with pytest.raises(LlmcError, match="the model takes no pictures") as caught:
            said(model, [3], RED)
        assert caught.value.hint == "compile it with --images, if it is a model that does"


def test_a_damaged_processor_is_one_error(tmp_path: Path) -> None:
    with (
        llmc.load(toy_pictured.build_artifact(tmp_path, processor=b"{}")) as model,
        pytest.raises(LlmcError, match="the artifact's processor is not what was written"),
    ):
        said(model, "a", RED)


def test_a_processor_of_another_number_of_rows_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = model.images.processor
    monkeypatch.setattr(processor.whole, "num_additional_image_tokens", 0)
    with pytest.raises(LlmcError, match="the model makes 3 rows of the picture, and its processor has places for 2"):
        said(model, "a", RED)
    gc.collect()
    assert model.info.n_rows == 0


def test_a_conversation_goes_on_behind_its_pictures(model: Model) -> None:
    with Conversation(model) as talk:
        first = "".join(piece.answer for piece in talk.ask("b", 3, images=[RED]))
        ids = talk.generation.tokens if talk.generation else []
        assert ids == answer(model, "u<image>ba", [RED], len(ids))
        assert talk.messages[0]["content"][1] == {"type": "text", "text": "b"}
        list(talk.ask("c", 3, images=[BLUE]))
        assert talk.generation is not None
        n_new = len(talk.generation.prompt)
        whole = f"u<image>ba{first}u<image>ca"
        assert talk.generation.tokens == answer(model, whole, [RED, BLUE], len(talk.generation.tokens))
        assert n_new < len(model.encode(whole, special=False)) + 2 * (TILE_ROWS - 1)
        assert model.info.n_rows == 2 * TILE_ROWS


def test_a_mark_in_what_is_said_is_no_picture(model: Model) -> None:
    with Conversation(model) as talk, pytest.raises(LlmcError, match="and none is given"):
        talk.ask("<image>")


def test_a_conversation_with_pictures_is_not_kept_in_a_file(model: Model, tmp_path: Path) -> None:
    with Conversation(model) as talk:
        list(talk.ask("b", 3, images=[RED]))
        with pytest.raises(LlmcError, match="a conversation with pictures is not kept in a file"):
            talk.save(tmp_path / "talk")
        talk.begin_anew()
        talk.save(tmp_path / "talk")


def test_a_message_whose_picture_cannot_be_read_is_taken_back(model: Model) -> None:
    with Conversation(model) as talk:
        with pytest.raises(LlmcError, match="this is no picture"):
            talk.ask("b", 3, images=[b"x"])
        assert talk.messages == []

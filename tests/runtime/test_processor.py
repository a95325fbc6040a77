"""The processor of an artifact's section: what it makes of pictures is what transformers makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.compiler.frontend.processor import class_name, read_processor
from llmc.runtime.errors import LlmcError
from llmc.runtime.processor import Processor, Section
from tests.pictured import ANY_SIZE, MARKS, PATCH, noise, save_processor, token_of


def section_of(folder: Path, kind: str = "llava") -> bytes:
    fields = {"image_token_id": token_of(kind)}
    return read_processor(folder, fields, (folder / "tokenizer.json").read_bytes(), str(folder))


def processor_of(folder: Path, kind: str) -> Processor:
    return Processor(Section.read(section_of(folder, kind)), (folder / "tokenizer.json").read_text(), "model.so")


@pytest.mark.parametrize("kind", [kind for kind in MARKS if kind not in ANY_SIZE])
def test_a_picture_is_prepared_as_transformers_prepares_it(kind: str, tmp_path: Path) -> None:
    processor = processor_of(save_processor(kind, tmp_path), kind)
    assert processor.image_mark == MARKS[kind]
    n_tiles = set()
    for width, height in ((28, 28), (100, 40), (40, 100), (7, 300)):
        prepared = processor(noise(width, height))
        assert prepared.tiles.dtype == np.float32
        assert prepared.tiles.shape[1:] == (3, 28, 28)
        assert prepared.ids.count(token_of(kind)) == 4 * len(prepared.tiles)
        n_tiles.add(len(prepared.tiles))
        whole = processor.prepare(f"a {MARKS[kind]}b", [noise(width, height)])
        assert np.array_equal(whole.tiles, prepared.tiles)
        assert whole.ids[2 : 2 + len(prepared.ids)] == prepared.ids
    assert (n_tiles == {1}) == (kind in ("llava", "gemma3"))


@pytest.mark.parametrize("kind", ANY_SIZE)
def test_patches_of_a_picture_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    processor = processor_of(save_processor(kind, tmp_path), kind)
    for width, height in ((28, 28), (100, 40), (7, 300)):
        prepared = processor(noise(width, height))
        assert prepared.grid is not None
        assert prepared.tiles.shape == (prepared.grid[0] * prepared.grid[1], 3 * 2 * PATCH**2)
        assert prepared.ids == (token_of(kind),) * (len(prepared.tiles) // 4)
        whole = processor.prepare(f"a {MARKS[kind]}b", [noise(width, height)])
        assert np.array_equal(whole.tiles, prepared.tiles)


@pytest.mark.parametrize(("kind", "said"), [("internvl", "(4, 3, 28, 28) 18"), ("qwen2_vl", "(16, 1176) 4")])
def test_it_runs_without_torch(kind: str, said: str, tmp_path: Path) -> None:
    """Nor with what reads videos, for which transformers wants torchvision."""
    folder = save_processor(kind, tmp_path)
    (tmp_path / "section").write_bytes(section_of(folder, kind))
    program = (
        "import sys; from pathlib import Path; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name.startswith('torch') else find(name, *more)\n"
        "from llmc.runtime.processor import Processor, Section; from tests.pictured import noise\n"
        f"folder = Path({str(tmp_path)!r}); section = Section.read((folder / 'section').read_bytes())\n"
        "made = Processor(section, (folder / 'tokenizer.json').read_text(), '')(noise(100, 40))\n"
        "print(made.tiles.shape, len(made.ids))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{said}\n", ran.stderr
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "section",
    [
        b"[]",
        b"{}",
        b'{"class": 1, "image_token": 2, "mark": 2, "files": {}}',
        b'{"class": "LlavaProcessor", "image_token": "2", "mark": 2, "files": {}}',
        b'{"class": "LlavaProcessor", "image_token": 2, "files": {}}',
        b'{"class": "LlavaProcessor", "image_token": 2, "mark": true, "files": {}}',
        b'{"class": "LlavaProcessor", "image_token": 2, "mark": 2, "files": {"../x": ""}}',
        b'{"class": "LlavaProcessor", "image_token": 2, "mark": 2, "files": {"config.json": 3}}',
        json.dumps(
            {"class": "LlavaProcessor", "image_token": 2, "mark": 2, "files": {"config.json": "x" * (5 << 20)}}
        ).encode(),
    ],
    ids=[
        "a list",
        "nothing",
        "no class",
        "no token",
        "no mark",
        "a mark of another kind",
        "a path",
        "no text",
        "too much",
    ],
)
def test_a_section_of_something_else_is_refused(section: bytes) -> None:
    with pytest.raises(ValueError, match=r"fields|files"):
        Section.read(section)


@pytest.mark.parametrize("name", ["BertModel", "os", "NoProcessor", "AutoProcessor"])
def test_no_other_class_is_made(name: str, tmp_path: Path) -> None:
    section = Section.read(section_of(save_processor("llava", tmp_path)))
    with pytest.raises(LlmcError, match=f"transformers cannot make the model's processor {name}"):
        Processor(section._replace(name=name), (tmp_path / "tokenizer.json").read_text(), "model.so")


def test_code_of_the_files_own_is_not_run(tmp_path: Path) -> None:
    folder = save_processor("llava", tmp_path)
    (folder / "own.py").write_text("raise SystemExit('run')")
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        said = json.loads((folder / file).read_text())
        (folder / file).write_text(
            json.dumps(said | {"auto_map": {"AutoImageProcessor": "own.X", "AutoTokenizer": "own.X"}})
        )
    assert processor_of(folder, "llava")(noise()).tiles.shape == (1, 3, 28, 28)


def test_a_picture_that_the_processor_refuses_is_one_error(tmp_path: Path) -> None:
    processor = processor_of(save_processor("llava", tmp_path), "llava")
    with pytest.raises(LlmcError, match="the model's processor refuses the picture"):
        processor.prepare("no mark", [noise()])


def test_the_class_is_the_one_that_the_files_name(tmp_path: Path) -> None:
    assert class_name(tmp_path, {"model_type": "llava"}) == "LlavaProcessor"
    assert class_name(tmp_path, {"model_type": "llama"}) is None
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "Idefics3Processor"}')
    assert class_name(tmp_path, {"model_type": "llava"}) == "Idefics3Processor"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"fields": {}}, "the model's configuration names no token that stands for pictures"),
        ({"fields": {"image_token_index": 3}}, "token 3 does not stand for the rows of a picture"),
        ({"tokenizer_json": None}, "a model without a tokenizer takes no pictures"),
    ],
)
def test_what_is_no_model_of_pictures_is_refused(change: dict[str, Any], fact: str, tmp_path: Path) -> None:
    folder = save_processor("llava", tmp_path)
    given = {
        "fields": {"image_token_id": token_of("llava")},
        "tokenizer_json": (folder / "tokenizer.json").read_bytes(),
    }
    with pytest.raises(LlmcError) as caught:
        read_processor(folder, place="here", **given | change)
    assert caught.value.fact == fact


def test_a_picture_whose_tokens_depend_on_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, prepare = save_processor("llava", tmp_path), Processor.prepare

    def two(self: Processor, text: str, pictures: list[Any]) -> Any:
        prepared = prepare(self, text, pictures)
        return prepared._replace(ids=prepared.ids[:-1]) if len(pictures) > 1 else prepared

    monkeypatch.setattr(Processor, "prepare", two)
    with pytest.raises(LlmcError, match="other tokens beside another one than alone"):
        section_of(folder)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_processor("llava", tmp_path)

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(Processor, "__init__", missing)
    with pytest.raises(LlmcError, match="--images needs the Python package PIL") as caught:
        section_of(folder)
    assert caught.value.hint == "pip install 'llmc[images]'"


def test_files_that_are_no_processors_are_not_carried(tmp_path: Path) -> None:
    folder = save_processor("llava", tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"x" * (5 << 20): 1}))
    with pytest.raises(LlmcError, match="the files of the processor have more than 4 MiB"):
        section_of(folder)


@pytest.mark.parametrize(
    ("name", "value", "is_fine"),
    [("pixel_attention_mask", [[1, 1]], True), ("pixel_mask", [[1, 0]], False), ("image_sizes", [[28, 28]], False)],
)
def test_what_says_more_of_a_picture_than_its_tiles_is_refused(
    name: str, value: Any, is_fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as which part of a tile is padding: the tower reads all of it."""
    processor = processor_of(save_processor("llava", tmp_path), "llava")
    made = {"pixel_values": np.zeros((1, 3, 28, 28)), "input_ids": [[1, 2]], name: value}
    monkeypatch.setattr(processor, "whole", lambda **_: made)
    if is_fine:
        assert processor(noise(28, 28)).ids == (1, 2)
    else:
        with pytest.raises(LlmcError, match=f"makes '{name}' of a picture beside tiles"):
            processor(noise(28, 28))

"""`llmc run --image` and `llmc chat --image`: pictures from files, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import llmc
from llmc.cli.main import main
from llmc.runtime import processor
from llmc.runtime.binding import Model
from tests.cli.test_main import COMMAND
from tests.pictured import noise
from tests.runtime import toy_pictured
from tests.runtime.stub_artifact import write_stub
from tests.runtime.toy_artifact import EOS
from tests.runtime.toy_pictured import answer

RED, BLUE = noise(4, 2, seed=1), noise(4, 2, seed=2)


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictured")
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    return toy_pictured.build_artifact(folder)


@pytest.fixture
def seeing(sighted: Path) -> Iterator[Model]:
    with llmc.load(sighted) as model:
        yield model


def said_to(model: Model, text: str, *pictures: Image.Image) -> str:
    """Three tokens that are no end."""
    return model.decode(answer(model, text, [*pictures], 3, logit_bias={EOS: -99}))


def ran(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], input=typed)


def test_run_continues_a_text_with_pictures(sighted: Path, seeing: Model) -> None:
    pictures = ("--image", sighted.with_name("red.png"), "--image", sighted.with_name("blue.png"))
    said = ran("run", sighted, *pictures, "-p", "a<image>b<image>c", "-n", 5, "--ignore-eos", "--json")
    assert said.exit_code == 0, said.stderr
    assert json.loads(said.stdout)["images_s"] > 0
    assert json.loads(said.stdout)["tokens"] == answer(seeing, "a<image>b<image>c", [RED, BLUE], 5)
    ids = ",".join(map(str, [toy_pictured.TOKEN, 5]))
    said = ran("run", sighted, *pictures[:2], "--tokens", ids, "-n", 3, "--ignore-eos")
    assert said.stdout == ran("run", sighted, *pictures[:2], "--tokens", ids, "-n", 3, "--ignore-eos").stdout != ""


def test_chat_shows_pictures_with_the_first_message(sighted: Path, seeing: Model) -> None:
    wanted = said_to(seeing, "u<image>ba", RED)
    options = ("chat", sighted, "--image", sighted.with_name("red.png"), "-n", 3, "--logit-bias", f"{EOS}=-99")
    one = ran(*options, "-p", "b")
    assert (one.stdout, one.stderr.startswith("1 picture in ")) == (wanted + "\n", True)
    assert json.loads(ran(*options, "-p", "b", "--json").stdout)["images_s"] > 0
    lines = ran(*options, typed="b\nc\n").stdout.splitlines()
    assert lines == [wanted, said_to(seeing, f"u<image>ba{wanted}uca", RED)]


def test_a_picture_is_shown_at_a_terminal(sighted: Path, seeing: Model) -> None:
    ours, theirs = pty.openpty()
    picture = sighted.with_name("red.png")
    os.write(ours, f"/image {picture}\n/image none.png\nb\n/exit\n".encode())
    command = [*COMMAND, "chat", str(sighted), "-n", "3", "--logit-bias", f"{EOS}=-99"]
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert said_to(seeing, "u<image>ba", RED) in done.stdout
    assert "1 for the next message" in done.stderr
    assert "error: the picture cannot be read: No such file or directory\n  at: none.png" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "fact"),
    [
        (("run", "--image", "none.png", "-p", "a"), 1, "the picture cannot be read"),
        (("run", "--image", "given.so", "-p", "a"), 1, "this is no picture"),
        (("run", "--image", "red.png", "-i"), 2, "--image is for one prompt"),
        (("run", "--image", "red.png", "-p", "a", "--prompt-cache", "x"), 1, "is not kept in a file"),
        (("chat", "--image", "none.png", "-p", "a"), 1, "the picture cannot be read"),
        (("chat", "--image", "red.png", "-p", "a", "--session", "x"), 2, "pictures are not kept in a file"),
    ],
)
def test_what_cannot_be_is_one_error(
    sighted: Path, arguments: tuple[str, ...], code: int, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sighted.parent)
    command, *rest = arguments
    said = ran(command, sighted, *rest)
    assert (said.exit_code, fact in said.stderr, said.stdout.strip()) == (code, True, "")


def test_a_model_of_texts_says_how_it_would_take_pictures(sighted: Path, tmp_path: Path) -> None:
    said = ran("run", write_stub(tmp_path / "stub.so"), "--image", sighted.with_name("red.png"), "--tokens", 3)
    assert said.exit_code == 1
    assert "the model takes no pictures" in said.stderr
    assert "--images" in said.stderr


@pytest.mark.parametrize("command", ["run", "chat"])
def test_what_is_not_installed_is_named(sighted: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(processor.Processor, "__init__", missing)
    said = ran(command, sighted, "--image", sighted.with_name("red.png"), "-p", "a")
    assert said.exit_code == 1
    assert "reading pictures needs the Python package PIL, which is not installed" in said.stderr
    assert "pip install 'llmc[images]'" in said.stderr

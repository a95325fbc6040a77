"""Texts that a server keeps are there for the next one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import llmc
from llmc.runtime.errors import LlmcError
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.stored_texts import StoredTexts
from tests.runtime import toy_artifact as toy
from tests.runtime.serve.served import PAGE, Served, prompt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "texts"


def serve(artifact: Path, folder: Path, *prompts: tuple[int, ...], kv_tokens: int = 640) -> list[int]:
    """A server's life, of these prompts one after the other.  -> how much of each it knew."""
    with llmc.load(artifact, kv_tokens=kv_tokens) as model:
        served = Served(model, prompt_cache=str(folder))
        jobs = [served.job(ids, 3) for ids in prompts]
        for job in jobs:
            served.submit(job)
            served.finish(job)
        served.engine.close()
        served.check(*jobs)
        assert model.info.kv_tokens_free == model.info.kv_tokens
        return [job.n_reused for job in jobs]


def test_a_server_knows_what_the_one_before_has_read(toy_so: Path, folder: Path) -> None:
    first, second = prompt(3 * PAGE + 1), prompt(3 * PAGE + 1, 5)
    assert serve(toy_so, folder, first, second) == [0, 0]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert serve(toy_so, folder, first, second) == [3 * PAGE] * 2
    assert serve(toy_so, folder) == []  # of nobody's asking nothing is lost
    assert serve(toy_so, folder, second) == [3 * PAGE]
    assert sorted(path.name for path in folder.iterdir()) == ["text-00.seq", "text-01.seq"]
    with llmc.load(toy_so) as model, model.restore(folder / "text-00.seq") as last:
        assert last.tokens[: len(second)] == list(second)[: len(last.tokens)]


def test_the_texts_used_last_are_taken_up_where_not_all_have_room(toy_so: Path, folder: Path) -> None:
    texts = [prompt(5 * PAGE + 1, salt) for salt in range(4)]
    serve(toy_so, folder, *texts)
    assert serve(toy_so, folder, texts[3], kv_tokens=3 * toy.CONTEXT) == [5 * PAGE]


def test_what_is_not_the_servers_is_left_aside_and_said(
    toy_so: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(toy_so, folder, prompt(2 * PAGE + 1))
    (folder / "notes.txt").write_text("mine")
    (folder / "text-01.seq").write_text("somebody's")
    assert serve(toy_so, folder, prompt(2 * PAGE + 1)) == [2 * PAGE]
    assert capsys.readouterr().err == f"not restored: this is not a saved sequence: {folder / 'text-01.seq'}\n"
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "text-00.seq"]
    (folder / "text-00.seq").write_text("another artifact's")
    serve(toy_so, folder)  # keeps nothing, and so takes nobody's place
    assert (folder / "text-00.seq").read_text() == "another artifact's"


def test_a_folder_that_has_gone_is_an_error_and_frees_all_the_same(toy_so: Path, folder: Path) -> None:
    with llmc.load(toy_so, kv_tokens=640) as model:
        served = Served(model, prompt_cache=str(folder))
        job = served.job(prompt(9), 3)
        served.submit(job)
        served.finish(job)
        folder.rmdir()
        with pytest.raises((LlmcError, OSError)):
            served.engine.close()
        assert model.info.kv_tokens_free == model.info.kv_tokens


def test_a_folder_that_takes_no_file_is_named_at_once(
    toy_so: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with llmc.load(toy_so) as model, pytest.raises(LlmcError, match="this is no path"):
        StoredTexts(model, "")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(LlmcError, match="no file can be made in this folder") as error:
        serve(toy_so, folder)
    assert error.value.place == str(folder)


def test_a_model_that_keeps_nothing_says_so(toy_so: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with llmc.load(toy_so) as model:
        monkeypatch.setattr(type(model), "is_whole", True)
        with pytest.raises(LlmcError, match="reads texts whole, and keeps nothing"):
            Engine(model, lambda _: None, max_batch=1, queue=1, prompt_cache=str(folder))
    assert not folder.exists()

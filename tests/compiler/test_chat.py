"""The chat template of a model folder, wherever its makers put it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.frontend.chat import read_chat
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.runtime.stub_artifact import write_stub


def chat_of(folder: Path, config: object = None, template: str | None = None) -> dict[str, Any] | None:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    said = read_chat(folder)
    return None if said is None else dict(json.loads(said))


def test_a_processors_old_file_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert json.loads(read_chat(tmp_path) or b"")["template"] == "old"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "new"}')
    assert json.loads(read_chat(tmp_path) or b"")["template"] == "new"


@pytest.mark.parametrize(
    "config", [None, {}, {"chat_template": []}, {"chat_template": [{"name": "rag", "template": "x"}]}]
)
def test_many_models_have_none(tmp_path: Path, config: object) -> None:
    assert chat_of(tmp_path, config) is None


def test_it_comes_with_the_special_tokens_that_it_writes(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ bos_token }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": None,
        "add_bos_token": True,
    }
    wanted = {"template": "{{ bos_token }}", "tokens": {"bos_token": "<s>", "eos_token": "</s>"}}
    assert chat_of(tmp_path, config) == wanted


def test_of_several_the_default_is_taken_and_that_for_tools_and_files_go_before(tmp_path: Path) -> None:
    named = [{"name": name, "template": name[0]} for name in ("tool_use", "default", "rag")]
    wanted = {"template": "d", "tool_use": "t", "tokens": {}}
    assert chat_of(tmp_path, {"chat_template": named}) == wanted
    assert chat_of(tmp_path, {"chat_template": named}, "f") == {"template": "f", "tokens": {}}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("u")
    assert chat_of(tmp_path) == {"template": "f", "tool_use": "u", "tokens": {}}


@pytest.mark.parametrize(("config", "fact"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, config: str, fact: str) -> None:
    with pytest.raises(LlmcError, match=f"tokenizer_config.json {fact}"):
        chat_of(tmp_path, config)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(LlmcError, match=r"chat_template\.jinja is not text in UTF-8"):
        chat_of(tmp_path, {})


def test_an_artifact_gives_it_back(tmp_path: Path) -> None:
    said = {"template": "x", "tool_use": "y", "tokens": {}}
    with ArtifactFile.open(write_stub(tmp_path / "a.so", chat=said)) as file:
        assert file.chat() == said
    with ArtifactFile.open(write_stub(tmp_path / "b.so")) as file:
        assert file.chat() is None
    with ArtifactFile.open(write_stub(tmp_path / "c.so", chat={"template": 3})) as file, pytest.raises(LlmcError):
        file.chat()
    wrong = {**said, "tool_use": 3}
    with ArtifactFile.open(write_stub(tmp_path / "d.so", chat=wrong)) as file, pytest.raises(LlmcError, match="'chat'"):
        file.chat()

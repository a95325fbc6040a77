"""How a model's makers turn messages into a prompt: their template, and the special tokens that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def read_chat(folder: Path) -> bytes | None:
    """The section "chat" of an artifact; None: the model does not say.

    A file of its own goes before the field of tokenizer_config.json, which may be a list of named ones.
    """
    config = read_object(folder / CONFIG)
    file = folder / TEMPLATE
    template = read_text(file) if file.is_file() else default_of(config.get("chat_template"))
    if template is None:
        return None
    tokens = {name: text_of(value) for name, value in config.items() if name.endswith("_token")}
    return section_of(template, {name: text for name, text in tokens.items() if text is not None})


def section_of(template: str, tokens: dict[str, str]) -> bytes:
    """The section, of a template and the special tokens by the names that it has for them."""
    return json.dumps({"template": template, "tokens": tokens}).encode()


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlmcError(f"{file.name} is not text in UTF-8", place=str(file)) from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no file."""
    if not file.is_file():
        return {}
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise LlmcError(f"{file.name} is not JSON: {error}", place=str(file)) from error
    if not isinstance(value, dict):
        raise LlmcError(f"{file.name} is not a JSON object", place=str(file))
    return value


def default_of(templates: object) -> str | None:
    """A template, or of several the one named default."""
    if isinstance(templates, list):
        named = {one.get("name"): one.get("template") for one in templates if isinstance(one, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else None


def text_of(token: object) -> str | None:
    """A special token, written as its text or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

"""How a model's makers turn messages into a prompt: their template, and the special tokens that it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmc.runtime.errors import LlmcError
from llmc.runtime.parse_json import parse_json

CONFIG, TEMPLATE, OTHERS = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
OLD_TEMPLATE = "chat_template.json"
"""Of models that take more than text, before there were files in Jinja."""
DEFAULT, TOOL_USE = "default", "tool_use"
"""Templates by name: the second one is for messages with tools, where there is one."""


def read_chat(folder: Path) -> bytes | None:
    """The section "chat" of an artifact; None: the model does not say.

    Files of their own go before the field of tokenizer_config.json, which may be a list of named ones.
    """
    config = read_object(folder / CONFIG)
    templates = named_in(config.get("chat_template")) or named_in(
        read_object(folder / OLD_TEMPLATE).get("chat_template")
    )
    if (folder / TEMPLATE).is_file():
        other = folder / OTHERS / f"{TOOL_USE}.jinja"
        templates = {DEFAULT: read_text(folder / TEMPLATE)}
        templates |= {TOOL_USE: read_text(other)} if other.is_file() else {}
    if DEFAULT not in templates:
        return None
    tokens = {name: text_of(value) for name, value in config.items() if name.endswith("_token")}
    return section_of(templates, {name: text for name, text in tokens.items() if text is not None})


def section_of(templates: Mapping[str, str], tokens: dict[str, str]) -> bytes:
    """The section, of templates by name and the special tokens by the names that they have for them."""
    also = {TOOL_USE: templates[TOOL_USE]} if TOOL_USE in templates else {}
    return json.dumps({"template": templates[DEFAULT], **also, "tokens": tokens}).encode()


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


def named_in(templates: object) -> dict[str, str]:
    """A template, or several, by name."""
    if not isinstance(templates, list):
        return {DEFAULT: templates} if isinstance(templates, str) else {}
    pairs = [(one.get("name"), one.get("template")) for one in templates if isinstance(one, dict)]
    return {name: template for name, template in pairs if isinstance(name, str) and isinstance(template, str)}


def text_of(token: object) -> str | None:
    """A special token, written as its text or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

"""What a message says: a text; or, where it has pictures, parts, each a text or a picture, in their order.

A part is {"type": "text", "text": …}, or {"type": "image", "picture": Picture}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from llmc.runtime.pictures import Picture

Content: TypeAlias = "str | list[dict[str, Any]]"
Piece: TypeAlias = "str | Picture"


def content_of(pieces: Iterable[Piece]) -> Content:
    """Pieces put together: a text unless there are pictures among them."""
    parts: list[dict[str, Any]] = []
    listed = [piece for piece in pieces if piece != ""]
    if not any(isinstance(piece, Picture) for piece in listed):
        return "".join(map(str, listed))
    for piece in listed:
        if isinstance(piece, Picture):
            parts.append({"type": "image", "picture": piece})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        else:
            parts.append({"type": "text", "text": piece})
    return parts


def pieces_of(content: Content) -> list[Piece]:
    """A list of pieces, to which more may be added; of an empty text an empty one."""
    if isinstance(content, str):
        return [content] if content else []
    return [part["picture"] if part["type"] == "image" else part["text"] for part in content]


def pictures_in(messages: Iterable[Mapping[str, Any]]) -> list[Picture]:
    """All pictures, in the order in which a template comes to them."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list) for part in content)
    return [part["picture"] for part in parts if isinstance(part, dict) and "picture" in part]


def size_of(content: Content) -> int:
    """About its bytes."""
    if isinstance(content, str):
        return len(content)
    return sum(len(piece) if isinstance(piece, str) else piece.n_bytes for piece in pieces_of(content))


def in_parts(content: Content) -> list[dict[str, Any]]:
    """As templates of models that take pictures have it: of a picture they are told that it is there."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "image"} if part["type"] == "image" else part for part in content]


def in_text(content: Sequence[Mapping[str, Any]], mark: str) -> str:
    """As templates have it that know texts alone: the marks of its pictures on lines of their own before the rest."""
    texts = [str(part["text"]) for part in content if part["type"] == "text"]
    return f"{mark}\n" * (len(content) - len(texts)) + "".join(texts)

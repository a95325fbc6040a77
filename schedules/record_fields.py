"""Check the fields of records that are read from a file, which anybody may have written."""

from __future__ import annotations

from typing import Any


def of_kind(value: Any, kind: Any) -> Any:
    """The value, if it is of the field's kind.  Raises TypeError."""
    known: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    name = kind if isinstance(kind, str) else getattr(kind, "__forward_arg__", getattr(kind, "__name__", ""))
    if not isinstance(value, known.get(name, (dict,))) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {name}")
    return value

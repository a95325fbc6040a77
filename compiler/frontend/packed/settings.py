"""What config.json says of how weights are kept, checked as it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from llmc.runtime.errors import LlmcError, shortened

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The fields of config.json's `quantization_config`.  place: where it lies, for messages."""

    method: str
    fields: Mapping[str, Any]
    place: str

    def one_of(self, name: str, known: tuple[T, ...], default: T | None = None) -> T:
        """The setting, which has to be one of those known.  Raises LlmcError: it is none, or is not there."""
        value = self.fields.get(name, default)
        for each in known:
            if type(value) is type(each) and value == each:
                return each
        raise self.refused(f"{name} {shortened(value)}", f"llmc reads {name} {', '.join(map(str, known))}")

    def number(self, name: str, least: int, default: int | None = None) -> int:
        """The setting, which has to be a whole number of at least `least`; None counts as not there."""
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) is not int or value < least:
            raise self.refused(f"{name} {shortened(value)}", "download the model again")
        return value

    def block(self, name: str) -> tuple[int, int]:
        """The setting, which has to be how many rows and columns a block has."""
        value = self.fields.get(name)
        if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)):
            raise self.refused(f"{name} {shortened(value)}", "download the model again")
        return value[0], value[1]

    def table(self, name: str) -> Mapping[str, Any]:
        """The setting, which has to be a table; an empty one where it is not there."""
        value = self.fields.get(name) or {}
        if not isinstance(value, dict):
            raise self.refused(f"{name} {shortened(value)}", "download the model again")
        return value

    def within(self, fields: Mapping[str, Any]) -> Settings:
        """The settings of a part."""
        return Settings(self.method, fields, self.place)

    def refused(self, what: str, hint: str | None = None) -> LlmcError:
        """The error that weights are not read which are kept so."""
        return LlmcError(f"weights in {self.method} with {what} are not read", place=self.place, hint=hint)

"""Reading the fields of a request, and what is said of those that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from llmc.runtime.errors import shortened

T = TypeVar("T")


class ApiError(Exception):
    """A request that is answered with an error in OpenAI's form.

    status: of HTTP.  param: the field that is wrong.  code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": …}"""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def no_such_model(asked: str, served: str, param: str | None = None, *, adapters: Sequence[str] = ()) -> ApiError:
    """The error for a request for another model than the one that is served, or an adapter of it."""
    also = f", with the adapters {shortened(', '.join(adapters), 200)}" if adapters else ""
    fact = f"the model {shortened(asked)!r} is not served here; {served!r} is{also}"
    return ApiError(404, fact, param=param, code="model_not_found")


def is_text(value: object) -> bool:
    """Whether a value is a text: not empty, and without half a surrogate pair, which only JSON takes for a string."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= one <= "\udfff" for one in value)


def is_ids(value: object) -> bool:
    """Whether a value is a list of token ids that is not empty."""
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def wrong(name: str, fact: str) -> ApiError:
    return ApiError(400, f"'{name}' {fact}", param=name, code="invalid_value")


def unsupported(name: str, reason: str) -> ApiError:
    return ApiError(400, f"'{name}' is not supported: {reason}", param=name, code="unsupported_parameter")


class Fields:
    """The object of a request, or one within it.  A field that is null is one that is not there."""

    def __init__(self, body: object, place: str = "") -> None:
        """place: what is put before the names of its fields."""
        if not isinstance(body, dict):
            raise ApiError(400, "the body of the request is no JSON object")
        self._body: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
        self.place = place

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def within(self, name: str) -> Fields:
        """The fields of a field that is an object; none if it is not there."""
        return Fields(self.of_type(name, dict, {}, "an object"), f"{self.place}{name}.")

    def wrong(self, name: str, fact: str) -> ApiError:
        return wrong(self.place + name, fact)

    def check_types(self, types: Mapping[str, tuple[type, str]]) -> None:
        """Raise ApiError where a field has another type than it should: by name that, and how it is called."""
        for name, (kind, what) in types.items():
            self.of_type(name, kind, kind(), what)

    def refuse_unknown(self, known: Collection[str]) -> None:
        """Refuse fields that are not known, as OpenAI does: a misspelled one shall not go unnoticed."""
        for name in self._body:
            if name not in known:
                short = shortened(self.place + name)
                raise ApiError(400, f"unrecognized request argument supplied: {short}", param=short)

    def refuse(self, reasons: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
        """Refuse fields but with values that change nothing: these by name, and why there are no others."""
        for name, (harmless, reason) in reasons.items():
            value = self.get(name)
            if value is not None and not any(type(value) is type(good) and value == good for good in harmless):
                raise unsupported(self.place + name, reason)

    def one_of(self, first: str, second: str) -> str:
        """Whichever of two names for the same field is given; the first if neither is."""
        if self.get(second) is None:
            return first
        if self.get(first) is not None:
            raise self.wrong(second, f"cannot be had together with '{first}'")
        return second

    def check_model(self, served: str) -> None:
        """Raise ApiError where another model is asked for."""
        name = self.of_type("model", str, served, "a string")
        if name != served:
            raise no_such_model(name, served, "model")

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, f"must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, fits: Callable[[float], bool], what: str) -> float:
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise self.wrong(name, f"must be a number {what}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        return self.of_type(name, bool, default, "true or false")

    def of_type(self, name: str, kind: type[T], default: T, what: str) -> T:
        value = self._body.get(name, default)
        if not isinstance(value, kind):
            raise self.wrong(name, f"must be {what}")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of some; none of them empty."""
        value = self._body.get(name, [])
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or len(listed) > most or not all(is_text(one) for one in listed):
            raise self.wrong(name, f"must be a string, or a list of at most {most}; none of them empty")
        return tuple(listed)

"""runtime/parse_json.py"""

import json
from collections.abc import Callable

import pytest

from llmc.runtime.parse_json import MOST_DEPTH, json_end, parse_json, parse_strict_json, parse_strict_json_patiently


def test_json_is_read_from_bytes_and_from_text() -> None:
    assert parse_json(b'{"a": [1]}') == parse_json('{"a": [1]}') == {"a": [1]}


@pytest.mark.parametrize("value", [{"a": [1, -2.5e3, True, None, {"b": "é\n\ud800"}]}, [], "x", [[[]]]], ids=range(4))
def test_patience_changes_nothing(value: object) -> None:
    text = json.dumps(value).encode()
    assert parse_strict_json_patiently(text) == parse_strict_json(text) == value


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000], ids=range(5))
@pytest.mark.parametrize("parse", [parse_json, parse_strict_json, parse_strict_json_patiently])
def test_whatever_is_wrong_is_a_value_error(parse: Callable[[bytes], object], text: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text", [b'{"a": {"b": 1, "b": 1}}', b"[NaN]", b"-Infinity", b'{"a": 1, "' + b"a" * 99 + b'": Infinity}']
)
@pytest.mark.parametrize("parse", [parse_strict_json, parse_strict_json_patiently])
def test_strangers_say_everything_once_and_in_numbers(parse: Callable[[bytes], object], text: bytes) -> None:
    with pytest.raises(ValueError, match=r"given twice|is no number of JSON"):
        parse(text)
    assert parse_json(text) is not None


@pytest.mark.parametrize(
    ("text", "end"), [('{"a": 1} b', 8), (" {} {}", 3), ('{"a": "}', 0), ("", 0), ("[" * 100_000, 0)]
)
def test_the_end_of_json_is_found(text: str, end: int) -> None:
    assert json_end(text) == end


@pytest.mark.parametrize("parse", [parse_strict_json, parse_strict_json_patiently])
def test_strangers_do_not_nest_too_deep(parse: Callable[[bytes], object]) -> None:
    for n, goes in ((MOST_DEPTH, True), (MOST_DEPTH + 1, False)):
        text = b'{"a":' * n + b"1" + b"}" * n
        if goes:
            assert parse(text) == parse_json(text)
        else:
            with pytest.raises(ValueError, match="nested too deep"):
                parse(text)
    assert parse(b"[" + b"[]," * (2 * MOST_DEPTH) + b"1]")


def test_patience_has_an_end() -> None:
    with pytest.raises(ValueError, match="more than 65536 lists and objects"):
        parse_strict_json_patiently(b"[" + b"[]," * (1 << 16) + b"1]")

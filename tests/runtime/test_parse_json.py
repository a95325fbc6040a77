"""runtime/parse_json.py"""

import pytest

from llmc.runtime.parse_json import parse_json


def test_json_is_read_from_bytes_and_from_text() -> None:
    assert parse_json(b'{"a": [1]}') == parse_json('{"a": [1]}') == {"a": [1]}


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, "1" * 5000], ids=range(5))
def test_whatever_is_wrong_is_a_value_error(text: bytes | str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert len(str(error.value)) < 200

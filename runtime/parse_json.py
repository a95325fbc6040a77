"""JSON from outside, in one way."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: bytes | bytearray | str) -> Any:
    """What the JSON says.  Raises ValueError alone, whatever is wrong: no JSON, no UTF-8, nested too deep to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None

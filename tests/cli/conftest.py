"""What tests of several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc
from llmc.runtime.binding import Model


@pytest.fixture
def model(stub: Path) -> Iterator[Model]:
    """The artifact of the module's own `stub`, open."""
    with llmc.load(stub) as model:
        yield model

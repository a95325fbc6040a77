"""The artifacts that embedding programs are tried with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model; another one when LLMC_EMBED_ARTIFACT names it."""
    named = os.environ.get("LLMC_EMBED_ARTIFACT")
    return Path(named).absolute() if named else toy.build_artifact(tmp_path_factory.mktemp("embed"))

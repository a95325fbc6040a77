"""The artifacts that embedding programs are tried with."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmc
from tests.runtime import toy_artifact as toy

STORIES = Path(__file__).parents[2] / "examples/stories/model"


@pytest.fixture(scope="session", params=["toy", "stories"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model of the runtime's tests, and the demonstration model as the compiler makes it."""
    folder = tmp_path_factory.mktemp("embed")
    if request.param == "toy":
        return toy.build_artifact(folder)
    llmc.compile(STORIES, out=folder / "stories.so", batch=(1,), verify=False)
    return folder / "stories.so"

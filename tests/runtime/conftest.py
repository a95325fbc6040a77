"""The toy model as an artifact, and the tests in C as programs, built once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime.toy_artifact import Host


@pytest.fixture(scope="session")
def toy_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact that can be loaded."""
    return toy.build_artifact(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The tests in C under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return toy.build_host(tmp_path_factory.mktemp("host"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def racing_host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """The tests in C under ThreadSanitizer."""
    return toy.build_host(tmp_path_factory.mktemp("racing"), "-fsanitize=thread")

"""The toy model as an artifact, and the tests in C as programs, built once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda
from tests.runtime.toy_artifact import Host
from tests.runtime.toy_cuda import FakeCuda


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


@pytest.fixture(scope="session")
def cuda_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact for a GPU that can be loaded."""
    folder = tmp_path_factory.mktemp("cuda")
    path = folder / "toy.so"
    path.write_bytes(toy.pack_sections(toy_cuda.sections(toy_cuda.build_code(folder))))
    return path


@pytest.fixture(scope="session")
def fake_libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The fake driver, and the toy's kernels for it."""
    folder = tmp_path_factory.mktemp("driver")
    return toy_cuda.build_driver(folder), toy_cuda.build_kernels(folder)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, fake_libraries: tuple[Path, Path], tmp_path: Path) -> Iterator[FakeCuda]:
    """A fake driver for this test, which must be used rightly and get everything back."""
    log = tmp_path / "calls.txt"
    fake = FakeCuda(monkeypatch, *fake_libraries, log)
    before = fake.live
    yield fake
    misused = [line for line in fake.calls() if line.startswith("error")]
    assert not misused
    assert fake.live == before

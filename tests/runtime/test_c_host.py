"""Tests written in C, under sanitizers: they link the runtime with the toy's kernels, and read an artifact by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime.toy_artifact import Host


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy artifact without code."""
    path = tmp_path_factory.mktemp("artifact") / "toy.art"
    path.write_bytes(toy.pack_sections(toy.toy_sections()))
    return path


def test_the_parts_work_alone(host: Host) -> None:
    assert host("units") == "ok\n"


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_lives_of_sequences_agree_with_the_oracle(host: Host, artifact: Path, n_threads: int, seed: int) -> None:
    assert host("scenarios", artifact, n_threads, seed, 1500).startswith("ok")


@pytest.mark.parametrize("n_threads", [2, 4])
def test_threads_do_not_race(racing_host: Host, artifact: Path, n_threads: int) -> None:
    assert racing_host("scenarios", artifact, n_threads, 3, 600).startswith("ok")


def test_every_failed_allocation_is_an_error_and_leaks_nothing(host: Host, artifact: Path) -> None:
    said = host("failures", artifact)
    assert said.startswith("ok") and int(said.split()[1]) > 15

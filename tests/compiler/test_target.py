"""compiler/target.py: what --target names."""

from __future__ import annotations

import pytest

from llmc.compiler.target import Target, missing_device, parse_target, runs_on
from llmc.runtime.errors import LlmcError


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_DRIVER", "libcuda-of-nobody.so.1")


def test_an_architecture_is_named_without_a_gpu(no_driver: None) -> None:
    target = parse_target("cuda:sm_90a")
    assert target == Target("cuda", "sm_90a")
    assert target.arch == 90
    assert target.features == ()


@pytest.mark.parametrize("text", ["cuda:sm_70", "cuda:x86-64-v3", "cpu:sm_90a", "rocm"])
def test_unknown_targets_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(LlmcError, match="unknown target") as error:
        parse_target(text)
    assert "cuda:sm_90a" in str(error.value.hint)


def test_asking_for_this_machines_gpu_needs_its_driver(no_driver: None) -> None:
    with pytest.raises(LlmcError, match="no NVIDIA driver to ask") as error:
        parse_target("cuda")
    assert "--target cuda:sm_90a" in str(error.value.hint)
    assert missing_device(Target("cuda", "sm_90a")) == ["an NVIDIA GPU"]


def test_code_for_one_architecture_alone_runs_there_alone() -> None:
    assert runs_on("sm_90a", 90)
    assert not runs_on("sm_90a", 100)
    assert runs_on("sm_80", 89)
    assert not runs_on("sm_89", 80)
    assert not runs_on("sm_80", 90)

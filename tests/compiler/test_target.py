"""compiler/target.py: what --target names."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler.target import (
    LEVELS,
    Target,
    missing,
    missing_device,
    never_chosen,
    parse_target,
    parse_targets,
    runs_on,
)
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


def test_several_targets_are_a_list_or_a_text_with_commas() -> None:
    names = ["cuda:sm_90a", "cuda:sm_80", "cpu:x86-64-v3"]
    assert [str(target) for target in parse_targets(names)] == names
    assert parse_targets(", ".join(names)) == parse_targets(["cuda:sm_90a,cuda:sm_80", "cpu:x86-64-v3"])
    assert parse_targets("cuda:sm_90a") == (Target("cuda", "sm_90a"),)
    with pytest.raises(LlmcError, match="unknown target ''"):
        parse_targets("cuda:sm_90a,")
    with pytest.raises(LlmcError, match="no target is given"):
        parse_targets([])


def test_a_target_given_twice_is_refused_under_whichever_name() -> None:
    here = str(parse_target("cpu"))
    for asked in (["cuda:sm_80", "cuda:sm_80"], ["cpu", here]):
        with pytest.raises(LlmcError, match=f"the target {asked[1]} is given twice".replace("+", r"\+")) as error:
            parse_targets(asked)
        assert error.value.place == f"--target {','.join(asked)}"


@pytest.mark.parametrize(
    ("asked", "idle"),
    [
        ("cpu:x86-64-v4+amx,cpu:x86-64-v4+bf16,cpu:x86-64-v4,cpu:x86-64-v3", {}),
        ("cpu:x86-64-v4+bf16,cpu:x86-64-v4+amx", {"cpu:x86-64-v4+amx": "cpu:x86-64-v4+bf16"}),
        ("cpu:x86-64-v3,cpu:x86-64-v4", {"cpu:x86-64-v4": "cpu:x86-64-v3"}),
        ("cuda:sm_90a,cuda:sm_89,cuda:sm_80,cpu:x86-64-v3", {}),
        ("cuda:sm_80,cuda:sm_89,cuda:sm_90a", {}),
        ("cpu:x86-64-v4,cuda:sm_90a", {"cuda:sm_90a": "cpu:x86-64-v4"}),
    ],
)
def test_a_target_behind_one_that_runs_there_too_is_noted(asked: str, idle: dict[str, str]) -> None:
    notes = never_chosen(parse_targets(asked))
    assert len(notes) == len(idle)
    for note, (target, before) in zip(notes, idle.items(), strict=True):
        assert note.startswith(f"{target} will not run")
        assert note.endswith(f": {before}, which runs there too, stands before it")


@pytest.mark.parametrize(("allowed", "level"), [(True, "x86-64-v4+amx"), (False, "x86-64-v4+bf16")])
def test_amx_counts_where_the_system_lets_us_use_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: bool, level: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {' '.join(LEVELS['x86-64-v4+amx'])}\n")
    monkeypatch.setattr("llmc.compiler.target.CPUINFO", cpuinfo)
    monkeypatch.setattr("llmc.compiler.target.tiles_allowed", lambda: allowed)
    assert parse_target("cpu") == Target("cpu", level)
    assert missing(Target("cpu", "x86-64-v4+amx")) == ([] if allowed else ["amx_bf16", "amx_int8", "amx_tile"])


def test_what_is_missing_is_said_in_words(no_driver: None) -> None:
    assert missing(parse_target("cpu")) == []
    assert missing(Target("cuda", "sm_80")) == ["an NVIDIA GPU"]

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


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with rows that stand for tokens, and all else that there is."""
    path = tmp_path_factory.mktemp("artifact") / "full.art"
    path.write_bytes(toy.pack_sections(toy.toy_sections(plan=toy.FullPlan().pack())))
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


@pytest.mark.parametrize("picture_rows", [0, 2])
def test_rows_are_found_until_they_are_given_back(host: Host, tmp_path: Path, picture_rows: int) -> None:
    plan = toy.FullPlan().pack(picture_rows=picture_rows, slot_bytes=0, default_slots=0)  # states do not go back
    (tmp_path / "rows.art").write_bytes(toy.pack_sections(toy.toy_sections(plan=plan)))
    assert host("rows", tmp_path / "rows.art", 1, 3000).startswith("ok")


def test_every_failed_allocation_is_an_error_and_leaks_nothing(host: Host, full: Path, artifact: Path) -> None:
    assert host("failures", full).startswith("ok")
    said = host("failures", artifact)
    assert said.startswith("ok")
    assert int(said.split()[1]) > 35
    left = {path.name for path in artifact.parent.iterdir() if path.name.startswith("toy.art.seq")}
    assert left == {"toy.art.seq"}


@pytest.mark.parametrize(
    ("files", "n_cpus"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/a/b\n"}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/gone\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 16),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,cpuacct:/box\n1:cpuset:/other\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            },
            3,
        ),
    ],
)
def test_the_quota_of_a_container_is_kept(host: Host, tmp_path: Path, files: dict[str, str], n_cpus: int) -> None:
    """Of 16 CPUs as many are used as the cgroup and those above it allow, rounded up."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert host("quota", tmp_path) == f"{n_cpus}\n"

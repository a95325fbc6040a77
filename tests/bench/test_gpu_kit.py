"""The kit for a GPU machine, tried out on the driver that stands in for one: what breaks there is physics, no typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.gpu import prepare
from llmc.bench.gpu.journal import Journal
from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from tests.emulator.build import build_library
from tests.runtime.toy_cuda import build_driver

TARGET = Target("cuda", "sm_90a")
TINY: dict[str, Any] = {
    "micro_times": 1,
    "copy_bytes": 1 << 16,
    "products": [[64, 64, 64]],
    "l2_bytes": 1 << 12,
    "shortest_ms": 0.0,
    "replays": 2,
}
CUBIN = b"\x7fELF, as the fake driver sees it"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a few odd shapes, and beside it the libraries that the fake driver runs instead of its cubins."""
    folder = tmp_path_factory.mktemp("kit")

    def write_kernels(path: Path, kernels: Sequence[Kernel], target: Target) -> None:
        with zipfile.ZipFile(path, "w") as out:
            for kernel in kernels:
                out.writestr(f"{kernel.name}.cubin", CUBIN)
        (folder / "kernels.so").symlink_to(build_library(kernels, target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "write_kernels", write_kernels)
        prepare.prepare(folder / "kit", TARGET, [], most=2, carried=False, few=True, settings=TINY)
    build_driver(folder)
    return folder


def run(kit: Path, out: Path, *options: str, **environment: str) -> Journal:
    """run.py of the kit, alone: it sees nothing of this checkout."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LLMC_CUDA_DRIVER": str(kit / "libcuda.so.1"),
        "LLMC_FAKE_CUDA_KERNELS": str(kit / "kernels.so"),
        "LLMC_FAKE_CUDA_LOG": str(out.parent / "fake.log"),
        **environment,
    }
    command = [sys.executable, "-P", str(kit / "kit" / "run.py"), "-o", str(out), *options]
    subprocess.run(command, env=environment, check=True, cwd=out.parent)
    return Journal(out / "results.jsonl")


def outcomes(journal: Journal, stage: str) -> dict[str, str]:
    return {item: entry["event"] for item, entry in journal.latest(stage).items()}


def test_every_kernel_is_run_and_right(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "abce")
    for stage in ("facts", "micro", "check", "limits"):
        failed = {item: entry for item, entry in journal.latest(stage).items() if entry["event"] != "done"}
        assert not failed
        assert journal.results(stage)
    misuse = [line for line in (tmp_path / "fake.log").read_text().splitlines() if line.startswith(("error", "leak"))]
    assert misuse == []

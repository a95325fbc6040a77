"""Kits on the driver that stands in for a GPU's, each made once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmc.bench.gpu import prepare
from llmc.bench.gpu.prepare import Wanted
from llmc.schedules.switches import PASSES
from tests.bench.fake_gpu import LLAMA, TARGET, TINY, TUNED, Made
from tests.emulator.build import build_library
from tests.runtime.toy_cuda import build_driver


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a few odd shapes, and beside it the libraries that the fake driver runs instead of its cubins."""
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        prepare.prepare(folder / "kit", TARGET, [], most=2, carried=False, odd="few", settings=TINY)
    (folder / "kernels.so").symlink_to(build_library(list(made.kernels.values()), TARGET))
    build_driver(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return Wanted(str(folder), max_sequence=None, batch=(1,))


@pytest.fixture(scope="session")
def model_kit(model: Wanted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a model, of whose calls a few are left to tune, and in their places those of them at M = 1."""
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        prepare.prepare(folder / "kit", TARGET, [model], most=2, odd="few", settings=TINY, switched=["tiny"])
    path = folder / "kit" / "kit.json"
    said = json.loads(path.read_text())
    (chain,) = said["chains"]
    in_chain = {step["job"] for step in chain["steps"]}
    said["jobs"] = [job for job in said["jobs"] if job["name"] in {*TUNED, *in_chain}]
    for job in said["jobs"]:
        if job["name"] not in TUNED:
            job |= {"of_chain": True, "candidates": job["candidates"][:1]}
    path.write_text(json.dumps(said))
    launches = [launch for job in said["jobs"] for each in job["candidates"] for launch in each["launches"]]
    needed = {launch["kernel"] for launch in launches}
    for wanted in (model, *(replace(model, switch=name) for name in PASSES)):
        needed |= {kernel.name for kernel in prepare.plan_model(wanted, TARGET).program.kernels}
    kernels = [kernel for name, kernel in made.kernels.items() if name in needed]
    (folder / "kernels.so").symlink_to(build_library(kernels, TARGET))
    build_driver(folder)
    return folder

"""The kit for a GPU machine, tried out on the driver that stands in for one: what breaks there is physics, no typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmc.bench.gpu import prepare
from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.prepare import Wanted
from llmc.compiler import artifact
from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.compiler.tune import import_tuning
from llmc.runtime import ArtifactFile
from llmc.schedules import cache, records
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
    "decode": [[1, 40]],
    "decode_large": [],
    "prefill": [40],
    "first": 1,
    "steps": 2,
    "prompts": 2,
}
CUBIN = b"\x7fELF, as the fake driver sees it"


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 192,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
}
TUNED = ("RMSNormLinear bf16 [128, 64] M=1", "RotaryPagedAttention bf16 [64, 32] M=1", "Linear bf16 [64, 96] M=64")
"""Calls that are tuned here: a GEMV, attention, a flat GEMM."""


class Made:
    """Kernels that were compiled, without a compiler."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: dict[str, Kernel] = {}
        patch.setattr(cache, "compile_kernels", self.compile)

    def compile(self, kernels: Sequence[Kernel], target: Target, progress: object = None) -> list[bytes]:
        self.kernels |= {kernel.name: kernel for kernel in kernels}
        return [CUBIN for _ in kernels]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a few odd shapes, and beside it the libraries that the fake driver runs instead of its cubins."""
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        prepare.prepare(folder / "kit", TARGET, [], most=2, carried=False, few=True, settings=TINY)
    (folder / "kernels.so").symlink_to(build_library(list(made.kernels.values()), TARGET))
    build_driver(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return Wanted(str(folder), max_sequence=None, batch=(1,))


@pytest.fixture(scope="module")
def model_kit(model: Wanted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of a model, of whose calls a few are left to tune."""
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        prepare.prepare(folder / "kit", TARGET, [model], most=2, few=True, settings=TINY)
    path = folder / "kit" / "kit.json"
    said = json.loads(path.read_text())
    said["jobs"] = [job for job in said["jobs"] if job["name"] in TUNED]
    path.write_text(json.dumps(said))
    launches = [launch for job in said["jobs"] for each in job["candidates"] for launch in each["launches"]]
    needed = {launch["kernel"] for launch in launches}
    needed |= {kernel.name for kernel in prepare.plan_model(model, TARGET).program.kernels}
    kernels = [kernel for name, kernel in made.kernels.items() if name in needed]
    (folder / "kernels.so").symlink_to(build_library(kernels, TARGET))
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


def misuse(log: Path) -> list[str]:
    """What the fake driver blames, but for facts of devices that it does not know."""
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("error", "leak")) and not line.startswith("error: attribute")]


def test_every_kernel_is_run_and_right(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "abce")
    for stage in ("facts", "micro", "check", "limits"):
        failed = {item: entry for item, entry in journal.latest(stage).items() if entry["event"] != "done"}
        assert not failed
        assert journal.results(stage)
    assert misuse(tmp_path / "fake.log") == []


def test_a_run_that_is_cut_off_goes_on_where_it_was(kit: Path, tmp_path: Path) -> None:
    first = run(kit, tmp_path / "first", "--stages", "a")
    with first.path.open("a") as file:  # the machine was lost in the middle of a line
        file.write('{"stage": "micro", "item": "pipe')
    resumed = run(kit, tmp_path / "second", "--stages", "ab", "--resume", str(first.path))
    entries = [entry for entry in resumed.entries() if entry["stage"] == "facts"]
    assert len(entries) == len(list(first.entries()))
    assert set(outcomes(resumed, "micro").values()) == {"done"}


def test_a_kernel_that_kills_its_context_is_recorded_and_left_behind(kit: Path, tmp_path: Path) -> None:
    """The next process goes on with the next kernel, and the tuner does not touch what is known to be wrong."""
    journal = run(kit, tmp_path / "out", "--stages", "b", LLMC_FAKE_CUDA="kernel=micro_order")
    found = outcomes(journal, "micro")
    assert [item for item, event in found.items() if event == "failed"] == ["order"]
    assert "CUDA_ERROR_LAUNCH_FAILED" in journal.latest("micro")["order"]["error"]
    assert list(found.values()).count("done") == len(found) - 1
    assert "- micro order: cuStreamSynchronize" in (tmp_path / "out" / "summary.md").read_text()


def test_without_a_driver_every_stage_says_so(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "a", LLMC_CUDA_DRIVER="libcuda-of-nobody.so.1")
    assert set(outcomes(journal, "facts").values()) == {"failed"}
    assert "no NVIDIA driver" in journal.latest("facts")["device"]["error"]


# -- tuning, and coming home ------------------------------------------------------------------------------------------


def test_what_was_tuned_comes_home_and_is_used(
    model: Wanted, model_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = run(model_kit, tmp_path / "out", "--stages", "aef")
    assert set(outcomes(journal, "tune").values()) == {"done"}
    assert {item.partition(" #")[0].partition(" @")[0] for item in journal.results("tune")} == set(TUNED)
    assert misuse(tmp_path / "fake.log") == []

    slow = [entry for entry in journal.results("tune").values() if entry["own"]]
    for entry in slow:  # the fake driver's clock knows no kernel from another
        rest = {key: value for key, value in entry.items() if key not in ("stage", "item", "event", "at", "us")}
        journal.append("tune", entry["item"], "done", us=2 * entry["us"], **rest)
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    (report,) = import_tuning(journal.path)
    assert report["path"] == str(tmp_path / "tuned" / "fake-gpu-0.json")
    assert report["machine"] == "Fake GPU 0, CUDA 13.0"
    assert len(report["records"]) == len(TUNED)

    planned = prepare.plan_model(model, TARGET)
    measured = {
        str(records.signature(choice.call, TARGET)): choice.implementation
        for choice in planned.program.choices
        if choice.implementation.measured
    }
    assert set(measured) == set(TUNED)
    faster = [m for each in measured.values() if (m := each.measured)["time_us"] < m["heuristic_us"]]
    assert len(faster) == len(TUNED) - 1  # for one there is nothing to choose


# -- models without their weights -------------------------------------------------------------------------------------


def test_an_artifact_is_filled_with_the_weights_that_compiling_gives_it(
    model: Wanted, model_kit: Path, tmp_path: Path
) -> None:
    carried = Model(model_kit / "kit" / "models" / "tiny")
    carried.write(tmp_path / "tiny.so")
    program = prepare.plan_model(model, TARGET).program
    weights = b"".join(artifact.packed_weights(program.weights, lambda done, total: None))
    with ArtifactFile.open(tmp_path / "tiny.so") as file:
        place = file.sections["weights"]
        assert file.plan().header.n_vocab == LLAMA["vocab_size"]
    data = (tmp_path / "tiny.so").read_bytes()
    assert data[place.offset : place.offset + len(weights)] == weights


def test_a_whole_model_runs_beside_hugging_face(model_kit: Path, tmp_path: Path) -> None:
    journal = run(model_kit, tmp_path / "out", "--stages", "ag", LLMC_GPU_WORK=str(tmp_path))
    assert set(outcomes(journal, "whole").values()) == {"done"}
    found = journal.results("whole")["tiny hf logits"]
    assert (found["agree"], found["of"]) == (32, 32)
    assert found["ratio"] < 1.5  # of Hugging Face's own error in bfloat16
    assert "| tiny | 1x40 |" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []

"""The kit for a GPU machine, tried out on the driver that stands in for one: what breaks there is physics, no typo."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmc.bench.gpu import carry, check, micro, plan, prepare, sanitize, work
from llmc.bench.gpu.chains import add_chains
from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.jobs import Jobs, add_model
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.prepare import Wanted
from llmc.cli import tune_gpu
from llmc.cli.main import main
from llmc.compiler import artifact
from llmc.compiler.kernel import Call, Kernel
from llmc.compiler.plan import Program
from llmc.compiler.target import Target
from llmc.compiler.tune import import_tuning
from llmc.runtime import ArtifactFile
from llmc.schedules import cache, records
from tests.emulator.build import build_library
from tests.runtime.toy_cuda import build_driver
from tests.test_layout import imported

TARGET = Target("cuda", "sm_90a")
TINY: dict[str, Any] = {
    "micro_times": 1,
    "copy_bytes": 1 << 16,
    "launches": 2,
    "products": [[64, 64, 64]],
    "sustained_s": 0.0,
    "l2_bytes": 1 << 12,
    "shortest_ms": 0.0,
    "replays": 2,
    "in_place": [[1, 40]],
    "short": [[1, 40]],
    "decode": [[1, 40]],
    "timeline": [[1, 40]],
    "traced_prompts": [40],
    "quantised": [],
    "compiled": [],
    "flash": [],
    "decode_large": [],
    "prefill": [40],
    "read": 64,
    "first": 1,
    "steps": 3,
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
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
    "vocab_size": 160,
    "max_position_embeddings": 192,
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
        prepare.prepare(folder / "kit", TARGET, [], most=2, carried=False, odd="few", settings=TINY)
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
    """A kit of a model, of whose calls a few are left to tune, and in their places those of them at M = 1."""
    folder = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        made = Made(patch)
        prepare.prepare(folder / "kit", TARGET, [model], most=2, odd="few", settings=TINY)
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
    needed |= {kernel.name for kernel in prepare.plan_model(model, TARGET).program.kernels}
    kernels = [kernel for name, kernel in made.kernels.items() if name in needed]
    (folder / "kernels.so").symlink_to(build_library(kernels, TARGET))
    build_driver(folder)
    return folder


def run(kit: Path, out: Path, *options: str, **environment: str) -> Journal:
    """run.py of the kit, alone: it sees nothing of this checkout."""
    started(kit, out, *options, **environment).check_returncode()
    return Journal(out / "results.jsonl")


def started(kit: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LLMC_CUDA_DRIVER": str(kit / "libcuda.so.1"),
        "LLMC_FAKE_CUDA_KERNELS": str(kit / "kernels.so"),
        "LLMC_FAKE_CUDA_LOG": str(out.parent / "fake.log"),
        **environment,
    }
    command = [sys.executable, "-P", str(kit / "kit" / "run.py"), "-o", str(out), *options]
    return subprocess.run(command, env=environment, check=False, cwd=out.parent, stderr=subprocess.PIPE, text=True)


def outcomes(journal: Journal, stage: str) -> dict[str, str]:
    return {item: entry["event"] for item, entry in journal.latest(stage).items()}


def misuse(log: Path) -> list[str]:
    """What the fake driver blames, but for facts of devices that it does not know."""
    lines = log.read_text().splitlines()
    return [line for line in lines if line.startswith(("error", "leak")) and not line.startswith("error: attribute")]


def test_the_programs_import_what_is_there(kit: Path) -> None:
    """The standard library, NumPy, what is compared with, and of llmc what the kit carries."""
    package = kit / "kit" / "llmc"
    carried = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    carried |= {name.removesuffix(".__init__") for name in carried}
    known = {*sys.stdlib_module_names, "numpy", "torch", "transformers", "llmc"}
    own = [*(package / "bench").rglob("*.py"), kit / "kit" / "run.py"]
    others = [path for path in package.rglob("*.py") if path not in own and path != package / "__init__.py"]
    names = [(path, name) for path in own for name in imported(path)]
    names += [(path, name) for path in others for name in imported_at_once(path)]
    for path, name in names:
        top, _, rest = name.partition(".")
        assert top in known, path
        assert top != "llmc" or {rest, rest.rpartition(".")[0]} & carried or rest == "__version__", (path, name)


def imported_at_once(path: Path) -> Iterator[str]:
    """What a file imports when it is imported itself; the rest is for those who have it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_kernel_is_run_and_right(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "abce")
    for stage in ("facts", "micro", "check", "limits"):
        failed = {item: entry for item, entry in journal.latest(stage).items() if entry["event"] != "done"}
        assert not failed
        assert journal.results(stage)
    assert misuse(tmp_path / "fake.log") == []


def test_a_run_that_is_cut_off_goes_on_where_it_was(kit: Path, tmp_path: Path) -> None:
    first = run(kit, tmp_path / "first", "--stages", "ab")
    whole = first.path.read_text().splitlines(keepends=True)
    first.path.write_text("".join(whole[:-4]) + whole[-4][:30])  # the machine was lost in the middle of a line
    before = [entry for entry in first.entries() if entry["stage"] == "micro"]
    resumed = run(kit, tmp_path / "second", "--stages", "ab", "--resume", str(first.path))
    after = [entry for entry in resumed.entries() if entry["stage"] == "micro"]
    assert after[: len(before)] == before
    assert [entry["event"] for entry in after].count("done") == len(micro.MICROS)


def test_results_of_another_kit_are_not_gone_on_with(kit: Path, tmp_path: Path) -> None:
    """Their candidates and artifacts may be others under the same names."""
    journal = run(kit, tmp_path / "out", "--stages", "a")
    text = journal.path.read_text()
    journal.path.write_text(text.replace(Kit(kit / "kit").digest, "another"))
    for folder, options in (("out", ()), ("second", ("--resume", str(journal.path)))):
        done = started(kit, tmp_path / folder, "--stages", "a", *options)
        assert done.returncode == 1
        assert "has what another kit found (another)" in done.stderr


def test_a_kernel_that_kills_its_context_is_recorded_and_left_behind(kit: Path, tmp_path: Path) -> None:
    """The next process goes on with the next kernel, and the tuner does not touch what is known to be wrong."""
    journal = run(kit, tmp_path / "out", "--stages", "b", LLMC_FAKE_CUDA="kernel=micro_order")
    found = outcomes(journal, "micro")
    assert [item for item, event in found.items() if event == "failed"] == ["order"]
    assert "CUDA_ERROR_LAUNCH_FAILED" in journal.latest("micro")["order"]["error"]
    assert list(found.values()).count("done") == len(found) - 1
    assert "- micro order: cuStreamSynchronize" in (tmp_path / "out" / "summary.md").read_text()


def test_a_run_out_of_time_checks_no_kernel(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "bc", "--seconds", "0.9")
    assert not journal.results("check")
    assert not journal.latest("check")


def test_a_run_without_a_driver_ends_at_once_and_says_so(kit: Path, tmp_path: Path) -> None:
    done = started(kit, tmp_path / "out", "--stages", "abc", LLMC_CUDA_DRIVER="libcuda-of-nobody.so.1")
    assert done.returncode == 1
    assert "error: the GPU cannot be used: no process could begin it: this machine has no NVIDIA driver" in done.stderr
    journal = Journal(tmp_path / "out" / "results.jsonl")
    assert outcomes(journal, "facts") == {"device": "failed"}
    assert not outcomes(journal, "micro") | outcomes(journal, "check")


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
    assert len(faster) == len(TUNED)


def test_a_machine_with_both_tunes_at_once(
    model: Wanted, model_kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llmc tune MODEL --target cuda: a kit, its run, and the records, on this machine."""
    Made(monkeypatch)
    first = TUNED[0]
    kept, chained = add_model, add_chains

    def few(jobs: Jobs, calls: Iterable[Call], most: int) -> None:
        kept(jobs, [call for call in calls if str(records.signature(call, TARGET)) == first], most)

    def own(jobs: Jobs, model: str, program: Program, most: int, wanted: Iterable[Sequence[int]]) -> Any:
        return chained(jobs, model, program, 1, wanted)

    monkeypatch.setattr(prepare, "add_model", few)
    monkeypatch.setattr(prepare, "add_chains", own)
    monkeypatch.setattr(prepare, "micro_kernels", dict)
    monkeypatch.setattr(prepare, "SETTINGS", {**prepare.SETTINGS, **TINY})
    monkeypatch.setattr(tune_gpu, "MOST", 2)
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "tuned"))
    monkeypatch.setenv("LLMC_CUDA_DRIVER", str(model_kit / "libcuda.so.1"))
    monkeypatch.setenv("LLMC_FAKE_CUDA_KERNELS", str(model_kit / "kernels.so"))
    answer = CliRunner().invoke(main, ["tune", model.model, "--target", str(TARGET), "--batch", "1", "--json"])
    assert answer.exit_code == 0, answer.stderr
    (report,) = json.loads(answer.stdout)["cards"]
    assert (report["path"], report["left_out"]) == (str(tmp_path / "tuned" / "fake-gpu-0.json"), [])
    (record,) = report["records"]
    assert f"{record['op']} {record['weight']} [{record['n']}, {record['k']}] M={record['m']}" == first
    assert (record["tried"], record["in_place"]) == (2, "tiny M=1 @40")


def test_candidates_are_measured_in_their_places(model_kit: Path, tmp_path: Path) -> None:
    """A model's layer, between its attentions, on the driver whose clock knows no kernel from another."""
    journal = run(model_kit, tmp_path / "out", "--stages", "ai")
    chain = "tiny M=1 @40"
    first, attention, _ = TUNED
    tried = [f"{chain}: {what} #1" for what in ("together", first, attention)]
    assert outcomes(journal, "in place") == dict.fromkeys([f"{chain}: own", *tried, f"{chain}: best"], "done")
    found = journal.results("in place")
    assert found[f"{chain}: own"]["us"] == found[f"{chain}: best"]["own_us"] > 0
    assert len({found[item]["base_us"] for item in tried}) == 1
    assert f"| {chain} | {found[f'{chain}: own']['us']:.1f} |" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []


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


def test_a_system_that_failed_twice_is_not_tried_further(model_kit: Path, tmp_path: Path) -> None:
    kit, journal = Kit(model_kit / "kit"), Journal(tmp_path / "results.jsonl")
    (part,) = plan.named("models in short")
    load, logits, *rest = work.waiting(part, kit, journal)
    assert [load, logits, rest[2]] == ["tiny llmc load", "tiny llmc logits", "tiny llmc decode 1x40"]
    for item in (load, logits):
        assert rest[2] in work.waiting(part, kit, journal)
        journal.append("whole", item, "failed", error="")
    assert work.waiting(part, kit, journal) == [item for item in rest if " llmc " not in item]


def test_relatives_of_a_kernel_that_hung_are_not_tried(kit: Path, tmp_path: Path) -> None:
    opened, journal = Kit(kit / "kit"), Journal(tmp_path / "results.jsonl")
    (part,) = plan.named("all other kernels")
    first, *rest = work.waiting(part, opened, journal)
    relatives = [item for item in rest if check.family(opened, item) == check.family(opened, first)]
    assert relatives
    journal.append("check", first, "failed", error="wrong by 1 of the largest result")
    assert work.waiting(part, opened, journal) == rest
    journal.append("check", first, "failed", error=f"{work.TOO_LONG}, or was stopped")
    assert work.waiting(part, opened, journal) == [item for item in rest if item not in relatives]


def test_what_is_folded_into_a_product_behind_layer_norm_is_filled_too(tmp_path: Path) -> None:
    """Decode of 64 has a norm's vectors multiplied by the weight of the product behind it."""
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "config.json").write_text(json.dumps(OPT))
    wanted = Wanted(str(tmp_path / "opt"), max_sequence=None, batch=(1, 64))
    with pytest.MonkeyPatch.context() as patch:
        Made(patch)
        carry.write_model(tmp_path / "kit", prepare.plan_model(wanted, TARGET), TARGET)
    carried = Model(tmp_path / "kit")
    folded = [weight for weight in carried.said["weights"] if weight["recipe"]["kind"] == "folded"]
    assert len(folded) == 3  # of two layers, but for the first norm
    carried.write(tmp_path / "opt.so")
    program = prepare.plan_model(wanted, TARGET).program
    weights = b"".join(artifact.packed_weights(program.weights, lambda done, total: None))
    with ArtifactFile.open(tmp_path / "opt.so") as file:
        place = file.sections["weights"]
    data = (tmp_path / "opt.so").read_bytes()
    assert data[place.offset : place.offset + len(weights)] == weights


def test_a_whole_model_runs_beside_hugging_face(model_kit: Path, tmp_path: Path) -> None:
    journal = run(model_kit, tmp_path / "out", "--stages", "ag", LLMC_GPU_WORK=str(tmp_path))
    assert set(outcomes(journal, "whole").values()) == {"done"}
    found = journal.results("whole")["tiny hf logits"]
    assert (found["agree"], found["of"]) == (32, 32)
    assert found["ratio"] < 1.5  # of Hugging Face's own error in bfloat16
    assert journal.results("whole")["tiny llmc timeline 1x40"]["kernels"] == []  # no GPU, no trace
    assert "| tiny | 1x40 |" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []


SANITIZER = """#!/bin/sh
# As compute-sanitizer: --tool NAME --error-exitcode N --print-limit N PROGRAM…; racecheck finds something in any GEMM.
tool=$2; shift 6
"$@" || exit
found=$(cat "$6"/results.jsonl | grep -c 'odd gemm.*"done"')
echo "========= ERROR SUMMARY: $tool"
[ "$tool" = racecheck ] && [ "$found" -gt 0 ] && exit 86 || exit 0
"""


def test_kernels_run_under_a_sanitizer(kit: Path, tmp_path: Path) -> None:
    """Two of its items, both at once; the others are known to have failed."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    wanted = ("memcheck odd attention bf16", "racecheck odd gemm")
    known = Journal(tmp_path / "known.jsonl")
    for item in sanitize.items(Kit(kit / "kit")):
        if item not in wanted:
            known.append(sanitize.STAGE, item, "failed", error="left out")
    options = ("--stages", "ad", "--resume", str(known.path))
    journal = run(kit, tmp_path / "out", *options, PATH=f"{tmp_path}:{os.environ['PATH']}")
    attention, gemm = (journal.latest(sanitize.STAGE)[item] for item in wanted)
    assert attention["kernels"] == attention["of"] > 0
    assert "odd attention bf16" in attention["slowest"]
    assert gemm["error"] == "RuntimeError: racecheck, exit status 86: ERROR SUMMARY: racecheck"

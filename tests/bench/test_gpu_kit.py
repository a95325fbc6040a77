"""The kit for a GPU machine, tried out on the driver that stands in for one."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.bench.gpu import check, micro, plan, sanitize, work
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from tests.bench.fake_gpu import environment_of, misuse, outcomes, run, started
from tests.test_layout import imported


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


def test_a_worker_that_hangs_ends_itself_though_nobody_watches(kit: Path, tmp_path: Path) -> None:
    """Its watcher may have been killed: some seconds behind the deadline an alarm ends it, whatever it waits in."""
    program = f"import sys; sys.path.insert(0, {str(kit / 'kit')!r}); import run; run.LATEST_S = -5; run.main()"
    options = ["-o", str(tmp_path), "--work", "primitives", "--deadline", f"{time.time() + 6:.1f}"]
    environment = {**environment_of(kit, tmp_path), "LLMC_FAKE_CUDA": "hangs=micro_product"}
    done = subprocess.run([sys.executable, "-P", "-c", program, *options], env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGALRM
    assert outcomes(Journal(tmp_path / "results.jsonl"), "micro") == {"pipeline": "done", "product": "begin"}


def test_a_run_out_of_time_checks_no_kernel(kit: Path, tmp_path: Path) -> None:
    journal = run(kit, tmp_path / "out", "--stages", "bc", "--seconds", "0.9")
    assert not journal.results("check")
    assert not journal.latest("check")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--resume", "nothing.jsonl"), "--resume: there is no file nothing.jsonl"),
        (("--stages", "abz"), "--stages: there is no stage z, but a, b, c"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    options: tuple[str, ...], said: str, kit: Path, tmp_path: Path
) -> None:
    done = started(kit, tmp_path / "out", *options)
    assert (done.returncode, said in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_driver_ends_at_once_and_says_so(kit: Path, tmp_path: Path) -> None:
    done = started(kit, tmp_path / "out", "--stages", "abc", LLMC_CUDA_DRIVER="libcuda-of-nobody.so.1")
    assert done.returncode == 1
    assert "error: the GPU cannot be used: no process could begin it: this machine has no NVIDIA driver" in done.stderr
    journal = Journal(tmp_path / "out" / "results.jsonl")
    assert outcomes(journal, "facts") == {"device": "failed"}
    assert not outcomes(journal, "micro") | outcomes(journal, "check")


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
    assert list(sanitize.report(journal)) == [
        f"- memcheck is clean: odd attention bf16 {attention['of']} of {attention['of']}"
    ]

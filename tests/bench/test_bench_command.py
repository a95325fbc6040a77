"""`llmc bench` with systems that are scripts: rounds, records, failures, what is printed."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.bench import limits
from llmc.bench.chart import measure
from llmc.bench.chart.record import Panel, Record, Sample, operations
from llmc.bench.chart.request import Task, number, numbers
from llmc.cli.main import main
from llmc.runtime.errors import LlmcError
from tests.bench.chart_fakes import Fakes, fakes

__all__ = ["fakes"]


def bench(*arguments: object, ending: int = 0) -> Result:
    given = ["small", "--batch", "1,2", "--lengths", "16,32", "--steps", "4", "--rounds", "2", "--prefill", "16"]
    result = CliRunner().invoke(main, ["bench", *given, *map(str, arguments)])
    assert result.exit_code == ending, result.output
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


def test_systems_take_turns_at_every_point(fakes: Fakes, file: Path) -> None:
    bench("--output", file)
    tasks = ["prefill 16", "decode 1x16", "decode 2x16", "decode 1x32", "decode 2x32"]
    turns = [f"{system} {task}" for task in tasks for system in ("llmc", "hf")]
    starts = ["llmc load bf16 random", "llmc prefill 16", "hf load bf16 random", "hf prefill 16"]
    lines = fakes.lines()
    assert sorted(lines[:6]) == sorted([*starts, *turns[:2]])[:6] or set(starts) <= set(lines)
    warm_up = "decode 1x16"  # before the first sample, two steps of the smallest point
    assert [line for line in lines if "load" not in line and warm_up not in line] == [
        line for line in turns * 2 if warm_up not in line
    ]


def test_a_prompt_is_set_against_all_that_it_multiplies() -> None:
    """100 weights for each of three tokens, logits (20 of them) for the last; attention to 1 + 2 + 3 tokens, scores and
    sums of 8 elements a layer."""
    model = {"n_weights": 100, "head_weights": 20, "attention_width": 8}
    assert operations(model, Task(0, 3)) == 2 * (3 * 80 + 20) + 2 * 2 * 8 * (1 + 2 + 3)
    assert operations({"n_weights": 100}, Task(0, 3)) == 2 * 3 * 100
    assert operations(model, Task(4, 3)) == 2 * 4 * 100


def test_the_limit_of_a_mixture_is_of_the_experts_that_a_step_reads() -> None:
    """A quarter of 80 bytes at one token, 35 at two; 20 bytes are read by every step."""
    sizes = {"step_bytes": 100, "expert_bytes": 80, "expert_share": 0.25, "kv_bytes_per_token": 0, "n_weights": 0}
    panel = Panel("m bf16", "M", "bf16", "random", [1, 2], [8], 8)
    panel.samples, panel.model = [Sample("llmc", "decode 1x8", [1.0], 1e-9, 0.0)], sizes
    record = Record(None, {}, 1, 1, 0.2, "2026-01-01", [], [panel])
    assert [record.limit(panel, Task(batch, 8)) for batch in (1, 2)] == pytest.approx([1 / 40, 2 / 55])


def test_the_record_has_what_the_chart_needs(fakes: Fakes, file: Path) -> None:
    bench("--output", file)
    record = Record.read(file)
    (panel,) = record.panels
    assert (panel.title, panel.precision, panel.published_context) == ("small", "bf16", 64)
    assert record.rate(panel, "hf", Task(2, 16)) == (2.0, 2.0, 2.0)
    assert record.speedup(panel, "llmc", "hf", Task(2, 16)) == (4.0, 4.0, 4.0)
    assert record.limit(panel, Task(1, 16)) == pytest.approx(20e9 / (2_000_000 + 16 * 256))
    assert panel.systems["hf"]["version"] == "hf 1.0"
    assert panel.systems["hf"]["peak_bytes"] > 1 << 20
    assert {"name", "memory_bytes", "llmc", "system"} <= record.machine.keys()
    assert record.commands
    assert record.date


def test_steps_that_read_much_stand_between_reads_of_memory(
    fakes: Fakes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads go at 20 GB/s, then at 10, and so on: each step at what is between them, whatever the run's median is."""
    rates = itertools.cycle([20e9, 10e9])
    monkeypatch.setattr(measure, "reader", lambda: lambda threads, n_bytes: n_bytes / next(rates))
    monkeypatch.setattr(measure, "READ_BYTES", 1_000_000)
    bench("--output", file)
    assert {"llmc hold 1x16", "llmc step", "hf decode 1x16"} <= set(fakes.lines())
    record = Record.read(file)
    (panel,) = record.panels
    (sample, *_) = panel.of("llmc", Task(2, 16))
    assert (sample.seconds, sample.beside_gb_per_s) == ([0.25] * 4, [15.0] * 4)
    assert all(sample.beside_gb_per_s is None for sample in panel.of("hf", Task(2, 16)))
    assert record.share(panel, Task(2, 16)) == pytest.approx((2_000_000 + 2 * 16 * 256) / 15e9 / 0.25)
    assert record.limit(panel, Task(2, 16)) == pytest.approx(2 * 15e9 / (2_000_000 + 2 * 16 * 256))


def test_the_table_says_rate_speedup_and_share(fakes: Fakes, file: Path) -> None:
    lines = bench("--output", file, "--markdown").stdout.splitlines()
    assert lines[0] == "| small, bf16 | | batch 1 | batch 2 |"
    assert lines[2] == "| 16 | llmc | **4.00, 4.0×**, 0% | **8.00, 4.0×**, 0% |"
    assert lines[3] == "|  | hf | 1.00 | 2.00 |"
    assert any(line.startswith("| llmc | 32.0") for line in lines)


def test_json_has_every_point(fakes: Fakes, file: Path) -> None:
    said = json.loads(bench("--output", file, "--json").stdout)
    points = said["panels"][0]["points"]
    assert len(points) == 8
    assert points[0]["times_hf"]["median"] == 4.0
    assert points[0]["samples"] == 2


def test_a_run_is_taken_up_where_it_ended(fakes: Fakes, file: Path) -> None:
    bench("--output", file, "--budget", "0", ending=130)
    assert Record.read(file).panels[0].samples == []
    bench("--output", file, "--resume")
    whole = json.loads(file.read_text())
    part = {**whole, "panels": [{**whole["panels"][0], "samples": whole["panels"][0]["samples"][:-1]}]}
    file.write_text(json.dumps(part))
    fakes.lines()
    bench("--output", file, "--resume")
    assert [line for line in fakes.lines() if "load" not in line and "1x16" not in line and "prefill" not in line] == [
        "hf decode 2x32"
    ]
    assert Record.read(file).panels[0].samples == [*map(tuple, whole["panels"][0]["samples"])]
    bench("--output", file, "--resume")
    assert fakes.lines() == []


def test_a_record_is_not_overwritten(fakes: Fakes, file: Path) -> None:
    file.write_text("{}")
    assert "there is a record already" in bench("--output", file, ending=1).stderr
    assert "not a record of llmc bench" in bench("--output", file, "--resume", ending=1).stderr
    assert file.read_text() == "{}"


def test_a_record_of_other_steps_is_not_continued(fakes: Fakes, file: Path) -> None:
    bench("--output", file)
    assert "another number of steps: 4, not 3" in bench("--output", file, "--resume", "--steps", 3, ending=1).stderr


def test_other_lengths_are_added_to_a_record(fakes: Fakes, file: Path) -> None:
    bench("--output", file)
    bench("--output", file, "--resume", "--lengths", "64")
    (panel,) = Record.read(file).panels
    assert panel.lengths == [16, 32, 64]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("is killed", "died at repeated: exit status -9"), ("refuses to load", "load: not today")],
)
def test_a_baseline_that_fails_is_left_out_and_the_rest_goes_on(
    fakes: Fakes, file: Path, how: str, reason: str
) -> None:
    fakes.behaviour["hf"] = how
    result = bench("--output", file, "--against", "hf,hf-compile", "--markdown")
    assert [line for line in result.stderr.splitlines() if f"hf left out: {reason}" in line]
    record = Record.read(file)
    (panel,) = record.panels
    assert panel.left_out == {"hf": reason}
    assert len(panel.of("llmc", Task(2, 32))) == len(panel.of("hf-compile", Task(2, 32))) == 2
    assert f"hf left out: {reason}." in result.stdout


def test_a_point_that_does_not_fit_says_what_it_needs(fakes: Fakes, file: Path) -> None:
    result = bench("--output", file, "--memory", 0.5, "--markdown")
    assert "| **4.00**, 0% |" in result.stdout
    assert "needs 1.3 GB, 0.5 GB free" in result.stdout
    (panel,) = Record.read(file).panels
    assert panel.unfit["hf decode 2x32"]["free"] == 500_000_000


def test_models_that_do_not_fit_together_are_loaded_for_their_turn(fakes: Fakes, file: Path) -> None:
    bench("--output", file, "--memory", 1.4)
    loads = [line for line in fakes.lines() if "load" in line]
    assert loads == ["llmc load bf16 random", "hf load bf16 random"] * 2


def test_a_length_beyond_the_model_is_marked(fakes: Fakes, file: Path) -> None:
    said = bench("--output", file, "--lengths", "128", "--markdown").stdout
    assert "| 128\\* | llmc |" in said
    assert "\\* beyond the model's own 64 positions: random weights, 128 positions." in said


def test_a_wrong_baseline_is_one_line(fakes: Fakes, file: Path) -> None:
    said = bench("--output", file, "--against", "vllm", ending=1).stderr
    assert said.startswith("error: no baseline 'vllm'\n  at: --against\n  hint: there are hf, hf-compile, onnxruntime")
    assert not file.exists()


def test_a_missing_package_is_one_line(fakes: Fakes, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return None if name == "openvino_genai" else found("json")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    said = bench("--output", file, "--against", "openvino", ending=1).stderr
    assert said.startswith("error: openvino needs the Python package openvino_genai, which is not installed")
    assert "pip install 'openvino-genai" in said


def test_a_full_disk_is_one_line_and_keeps_the_results(
    fakes: Fakes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, times = Path.write_text, iter(range(100))

    def write_text(path: Path, *arguments: Any, **options: Any) -> int:
        if path.suffix == ".part" and next(times) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    said = bench("--output", file, ending=1).stderr
    assert "error: the record could not be written: No space left on device" in said
    assert len(Record.read(file).panels[0].samples) == 4
    assert not file.with_name("record.json.part").exists()


@pytest.mark.parametrize("text", ["x", "0", "1,-2", "1kk"])
def test_wrong_numbers_are_wrong_usage(text: str) -> None:
    assert CliRunner().invoke(main, ["bench", "--lengths", text]).exit_code == 2


def test_lengths_are_numbers_and_thousands() -> None:
    assert number("4K") == 4096
    assert numbers("1k, 128,128") == (128, 1024)


@pytest.mark.parametrize("name", ["chart.pdf", "nowhere/chart.png"])
def test_a_picture_that_cannot_be_is_refused_before_measuring(fakes: Fakes, file: Path, name: str) -> None:
    bench("--output", file, "--plot", file.parent / name, ending=1)
    assert not file.exists()


def test_what_cannot_begin_leaves_no_record(file: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(file.with_suffix(".so")), "--output", str(file)])
    assert (result.exit_code, "error: no such file" in result.stderr) == (1, True)
    assert not file.exists()


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LlmcError, match="PyTorch finds no NVIDIA GPU on this machine"):
        limits.gpu_name()

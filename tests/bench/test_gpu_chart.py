"""From a kit's results to a record of `llmc bench`, its table and its picture.  All numbers here are invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llmc.bench.chart.record import Record
from llmc.bench.chart.request import Task
from llmc.bench.gpu.chart import records_of
from llmc.cli.main import main
from llmc.runtime.errors import LlmcError

LOAD: dict[str, Any] = {
    "dtype": "bf16",
    "n_context": 4096,
    "target": "cuda:sm_90a",
    "kv_bytes_per_token": 1000,
    "load_s": 2.0,
}


class Results:
    """A results.jsonl, line by line."""

    def __init__(self, path: Path, card: str = "Invented GPU", driver: str = "1.0") -> None:
        self.path = path
        self.say("facts", "device", name=card, memory_bytes=80 * 10**9, cuda="13.0")
        self.say("facts", "machine", driver=driver, python="3.12")
        self.say("limits", "copy", gb_per_s=1000.0)
        self.say("limits", "cuBLAS bf16 1x1x1", gflop_per_s=1e6)

    def say(self, stage: str, item: str, event: str = "done", **said: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "item": item, "event": event, "at": 1.8e9, **said}) + "\n")

    def model(
        self, name: str, quant: str = "none", created: str = "first", step_bytes: int = 10**9, **counted: int
    ) -> None:
        sizes: dict[str, Any] = {"weight_bytes": 2 * step_bytes, "step_bytes": step_bytes, **counted}
        self.say("whole", f"{name} llmc load", quant=quant, created=created, version="llmc 0", **sizes, **LOAD)
        if quant == "none":
            self.say("whole", f"{name} hf load", load_s=9.0, version="transformers 0")

    def decode(self, model: str, system: str, point: str, *seconds: float) -> None:
        self.say("whole", f"{model} {system} decode {point}", seconds=list(seconds))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    made = Results(tmp_path / "results.jsonl")
    made.model("opt-6.7b")
    for batch in (1, 8):
        for length, slower in ((128, 4.0), (4096, 5.0)):
            made.decode("opt-6.7b", "llmc", f"{batch}x{length}", 0.002, 0.003, 0.002)
            made.decode("opt-6.7b", "hf", f"{batch}x{length}", 0.002 * slower, 0.002 * slower)
    made.decode("opt-6.7b", "hf-graph", "1x128", 0.003)
    made.say("whole", "opt-6.7b hf-graph decode 8x128", "failed", error="OutOfMemoryError: CUDA out of memory")
    made.decode("opt-6.7b", "llmc", "64x128", 0.01)
    made.say("whole", "opt-6.7b llmc prefill 1024", seconds=[0.5], tokens=1024)
    return made


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_results_become_a_record_with_its_picture(results: Results, tmp_path: Path) -> None:
    picture, kept = tmp_path / "chart.svg", tmp_path / "chart-gpu.json"
    answer = bench("--from", results.path, "--output", kept, "--plot", picture, "--markdown")
    assert answer.exit_code == 0, answer.output
    assert "| OPT-6.7B, bf16 | | batch 1 | batch 8 |" in answer.stdout
    # half of 1 TB/s: a gigabyte of weights (and little of a cache) in 2 ms
    assert "| 128 | llmc | **500, 4.0×**, 50% |" in answer.stdout
    assert "| 4k\\* | llmc | **500, 5.0×**, 50% |" in answer.stdout
    assert "|  | hf-graph | 333, 2.7× | no room |" in answer.stdout
    assert "Invented GPU, driver 1.0, 80 GB, 2027-01-15, memory copied at 1000.0 GB/s" in answer.stdout
    text = picture.read_text()
    assert text.startswith("<?xml")
    again = bench("--from", kept, "--markdown")
    assert again.stdout == answer.stdout


def test_many_sequences_are_kept_but_not_drawn(results: Results) -> None:
    (record,) = records_of([results.path])
    (panel,) = record.panels
    assert (panel.batches, panel.lengths) == ([1, 8], [128, 4096])
    assert record.rate(panel, "llmc", Task(64, 128)) == (6400.0, 6400.0, 6400.0)
    assert record.rate(panel, "llmc", Task(0, 1024)) == (2048.0, 2048.0, 2048.0)


def test_of_two_visits_the_artifact_measured_last_counts(results: Results, tmp_path: Path) -> None:
    second = Results(tmp_path / "second.jsonl")
    second.model("opt-6.7b", created="tuned")
    (record,) = records_of([results.path, second.path])  # lost before it made a step: the first stands
    assert record.panels[0].model["compiled"] == {"opt-6.7b": "first"}
    second.decode("opt-6.7b", "llmc", "1x128", 0.001)
    second.decode("opt-6.7b", "hf", "1x128", 0.010)
    (record,) = records_of([results.path, second.path])
    (panel,) = record.panels
    assert [sample.seconds for sample in panel.of("llmc", Task(1, 128))] == [[0.001]]
    assert [sample.seconds for sample in panel.of("hf", Task(1, 128))] == [[0.008, 0.008], [0.010]]
    assert panel.model["compiled"] == {"opt-6.7b": "tuned"}


def test_quantised_weights_stand_beside_what_they_were_quantised_from(results: Results) -> None:
    results.model("opt-6.7b-int8", "int8", step_bytes=5 * 10**8)
    results.decode("opt-6.7b-int8", "llmc", "1x128", 0.001)
    (record,) = records_of([results.path])
    panel = record.panels[1]
    assert (panel.name, panel.title, panel.precision) == ("opt-6.7b int8", "OPT-6.7B", "int8")
    assert panel.systems["hf"]["precision"] == "bf16"
    ratio = record.speedup(panel, "llmc", "hf", Task(1, 128))
    assert ratio
    assert ratio.median == pytest.approx(8.0)


def test_how_many_weights_a_step_multiplies_is_counted_or_guessed_from_bytes(results: Results) -> None:
    results.model("opt-6.7b-int4", "int4", step_bytes=4_500_000, n_weights=7_900_000)
    results.decode("opt-6.7b-int4", "llmc", "1x128", 0.001)
    plain, quantised = records_of([results.path])[0].panels
    assert (plain.model["n_weights"], quantised.model["n_weights"]) == (5 * 10**8, 7_900_000)
    assert plain.model["head_weights"] == 50272 * 4096  # as a model of that name has


def test_two_cards_are_two_records(results: Results, tmp_path: Path) -> None:
    other = Results(tmp_path / "other.jsonl", card="Another GPU")
    other.model("llama2-7b")
    other.decode("llama2-7b", "llmc", "1x128", 0.001)
    assert [record.machine["gpu"] for record in records_of([results.path, other.path])] == [
        "Invented GPU",
        "Another GPU",
    ]
    answer = bench("--from", results.path, "--from", other.path, "--output", tmp_path / "both.json")
    assert "error: the results are of 2 machines: Invented GPU, Another GPU" in answer.stderr
    assert not (tmp_path / "both.json").exists()


@pytest.mark.parametrize(
    "line", ["", '{"stage": "whole"', '{"stage": "whole", "item": "m llmc load", "event": "done"}', "3"]
)
def test_results_without_a_model_are_one_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    answer = bench("--from", path)
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: ")


def test_results_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match="the measurements cannot be read"):
        records_of([tmp_path / "nothing.jsonl"])


def test_a_record_says_where_it_is_from(results: Results, tmp_path: Path) -> None:
    bench("--from", results.path, "--output", tmp_path / "chart-gpu.json")
    record = Record.read(tmp_path / "chart-gpu.json")
    assert record.commands == ["llmc bench --from results.jsonl"]
    assert record.machine_in_words == "Invented GPU, driver 1.0"


@pytest.mark.parametrize(
    "hostile",
    [
        '{"stage": "facts", "item": "device", "event": "done", "at": 1, "memory_bytes": Infinity}',
        '{"stage": "whole", "item": "opt-6.7b llmc decode 1x128", "event": "done", "at": 1e300, "seconds": [1.0]}',
        '{"stage": "whole", "item": "opt-6.7b", "event": "done", "at": 1}',
    ],
    ids=range(3),
)
def test_what_makes_no_sense_is_one_clear_line(hostile: str, results: Results) -> None:
    with results.path.open("a") as file:
        file.write(hostile + "\n")
    result = bench("--from", results.path, "--markdown")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the measurements cannot be understood: ")


@pytest.mark.parametrize("torn", ['{"stage": "whole", "it', "[" * 100_000], ids=["short", "deep"])
def test_a_line_that_is_no_json_counts_for_nothing(torn: str, results: Results) -> None:
    before = bench("--from", results.path, "--markdown")
    with results.path.open("a") as file:
        file.write(torn + "\n")
    after = bench("--from", results.path, "--markdown")
    assert (after.exit_code, after.stdout) == (0, before.stdout)


def test_a_time_of_nothing_is_no_time(results: Results) -> None:
    results.decode("opt-6.7b", "llmc", "2x128", 1e-320)
    (record,) = records_of([results.path])
    assert "decode 2x128" not in {sample.task for sample in record.panels[0].samples}

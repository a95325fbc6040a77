"""The comparison with other systems, with peers that are scripts: turns, failures, records."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest

from llmc.bench import compare
from llmc.bench.peers import environments, quiet, table
from llmc.bench.peers.environments import Entry
from llmc.bench.peers.process import PeerError, PeerProcess
from llmc.bench.peers.quiet import Neighbours
from llmc.bench.peers.record import Record

ROOT = Path(__file__).parents[2]

FAKE = """
import sys
from pathlib import Path
from llmc.bench.peers.protocol import Refusal, serve

NAME, HOW, DIARY = sys.argv[1:]
if HOW == "missing package":
    import a_package_that_nobody_has

class Fake:
    def prepare(self, config, source, out, precision):
        out.write_text(precision)

    def load(self, loading):
        print("noise on standard output")
        assert loading.room == 9 + 3 + 2 and set(loading.batches) == {1, 4}
        self.note(f"load {loading.precision}")
        return f"{NAME} 1.0"

    def prefill(self, prompt):
        self.note(f"prefill {len(prompt)} {prompt[0]}")
        if HOW == "refuses prompts":
            raise Refusal("no prompts here")
        return 0.5

    def decode(self, prompts, steps):
        self.note(f"decode {len(prompts)} {steps}")
        if HOW == "dies" and steps > 2:
            sys.exit("out of memory")
        return [0.1] * (steps - 1) + [0.9]

    def note(self, what):
        with open(DIARY, "a") as diary:
            diary.write(f"{NAME} {what}\\n")

serve(Fake())
"""

TASKS = ["decode 1x7", "decode 4x7", "prefill 9"]
Compare = Callable[..., Record]


@pytest.fixture
def behaviour() -> dict[str, str]:
    """How each fake behaves; a system that is not named here works."""
    return {}


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture
def neighbours() -> Iterator[float]:
    """Cores that others keep busy during one sample after another; none when this ends."""
    return iter(())


@pytest.fixture
def run(
    tmp_path: Path,
    diary: Path,
    behaviour: dict[str, str],
    neighbours: Iterator[float],
    monkeypatch: pytest.MonkeyPatch,
) -> Compare:
    """`python -m bench.compare` on fakes; the record it leaves."""
    script = tmp_path / "fake.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FAKE}")

    def command(system: str) -> list[str]:
        return [sys.executable, str(script), system, behaviour.get(system, "works"), str(diary)]

    monkeypatch.setattr(environments, "command", command)
    monkeypatch.setattr(environments, "python", lambda system: Path(sys.executable))
    monkeypatch.setattr(environments, "make_environment", lambda system: None)
    monkeypatch.setattr(environments, "make_source", lambda config, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(environments, "BUILD", tmp_path / "build")
    monkeypatch.setattr(Neighbours, "cores", lambda self: next(neighbours, 0.0))
    monkeypatch.setattr(compare, "reader", lambda: lambda n_threads, n_bytes: 0.02)

    def run(peers: str, *more: str) -> Record:
        record = tmp_path / "record.json"
        given = ["--model", "opt-125m", "--peers", peers, "--batch", "1,4", "--context", "7", "--steps", "3"]
        given += ["--prefill", "9", "--rounds", "2", "--threads", "2", "--record", str(record), *more]
        compare.main([*given, "--setup"])
        compare.main(given)
        return Record.read(record)

    return run


def timed_lines(diary: Path, name: str = "") -> list[str]:
    """What the fakes noted, without loading and warming up (two steps, the prompt of salt 0)."""
    lines = [line for line in diary.read_text().splitlines() if line.startswith(name)]
    return [line for line in lines if " load " not in line and not line.endswith((" 2", " 3 3", "prefill 9 3"))]


def test_peers_take_turns_at_every_task(run: Compare, diary: Path) -> None:
    record = run("llmc:bf16,hf:bf16")
    one_round = ["llmc decode 1 3", "hf decode 1 3", "llmc decode 4 3", "hf decode 4 3"]
    lines = timed_lines(diary)
    assert lines == [
        *one_round,
        *("llmc prefill 9 134", "hf prefill 9 134"),
        *one_round,
        *("llmc prefill 9 265", "hf prefill 9 265"),
    ]
    assert record.tasks() == TASKS
    assert all(record.rounds(peer, task) == 2 for peer in ("llmc:bf16", "hf:bf16") for task in TASKS)
    assert record.peers == {"llmc:bf16": "llmc 1.0", "hf:bf16": "hf 1.0"}


def test_the_record_is_json_with_every_step(run: Compare, tmp_path: Path) -> None:
    run("hf:bf16")
    fields = json.loads((tmp_path / "record.json").read_text())
    assert fields["model"] == "opt-125m"
    assert fields["samples"][0] == ["hf:bf16", "decode 1x7", [0.1, 0.1, 0.9], pytest.approx(26.84, abs=0.01), 0.0]


def test_rates_are_of_medians(run: Compare) -> None:
    record = run("hf:bf16")
    assert record.rate("hf:bf16", "decode 4x7") == (40.0, 40.0, 40.0)
    assert record.rate("hf:bf16", "prefill 9") == (18.0, 18.0, 18.0)
    assert record.rate("hf:bf16", "prefill 10") is None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("dies", "died at decode: out of memory (exit status 1)"),
        ("missing package", "died at load: ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
        ("refuses prompts", "prefill: no prompts here"),
    ],
)
def test_a_peer_that_fails_is_left_out_and_the_rest_goes_on(
    how: str, reason: str, run: Compare, behaviour: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    behaviour["llama.cpp"] = how
    path = environments.model_path("opt-125m", Entry("llama.cpp", "bf16"))
    path.parent.mkdir(parents=True)
    path.touch()
    record = run("llama.cpp:bf16,hf:bf16")
    assert record.left_out["llama.cpp:bf16"].startswith(reason)
    assert [line for line in capsys.readouterr().err.splitlines() if f"left out: {reason}" in line]
    assert all(record.rounds("hf:bf16", task) == 2 for task in TASKS)
    assert record.rounds("llama.cpp:bf16", "prefill 9") == 0


def test_a_peer_without_an_environment_is_left_out(
    run: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environments, "python", lambda system: tmp_path / "nowhere")
    entry = Entry("hf", "bf16")
    environments.model_path("opt-125m", entry).parent.mkdir(parents=True)
    environments.model_path("opt-125m", entry).touch()
    assert run("hf:bf16").left_out == {"hf:bf16": "not installed; run with --setup"}


def test_a_record_is_taken_up_where_it_ended(run: Compare, diary: Path, tmp_path: Path) -> None:
    whole = run("llmc:bf16,hf:bf16")
    file = tmp_path / "record.json"
    fields = json.loads(file.read_text())
    fields["samples"] = fields["samples"][:-3]
    file.write_text(json.dumps(fields))
    diary.write_text("")
    again = run("llmc:bf16,hf:bf16")
    assert timed_lines(diary) == ["hf decode 4 3", "llmc prefill 9 265", "hf prefill 9 265"]
    assert again.samples == whole.samples
    diary.write_text("")
    run("llmc:bf16,hf:bf16")
    assert diary.read_text() == ""


def test_a_record_of_something_else_is_not_continued(run: Compare, tmp_path: Path) -> None:
    run("hf:bf16")
    with pytest.raises(SystemExit, match="a record of opt-125m with 2 threads"):
        Record.open(tmp_path / "record.json", model="opt-6.7b", threads=2, neighbours=0.2)


@pytest.mark.parametrize("neighbours", [iter([0.1, 0.9])])
def test_a_sample_with_busy_neighbours_is_kept_and_measured_again(run: Compare, neighbours: Iterator[float]) -> None:
    record = run("hf:bf16")
    assert [sample.task for sample in record.samples] == [*TASKS, *TASKS, "decode 4x7"]
    assert [record.rounds("hf:bf16", task) for task in TASKS] == [2, 2, 2]
    assert "1 of 7 samples dropped: others used more than 0.2 cores." in table.table_of(record)


@pytest.mark.parametrize("neighbours", [repeat(2.0)])
def test_a_machine_that_is_never_quiet_gives_no_rate(run: Compare, neighbours: Iterator[float]) -> None:
    record = run("hf:bf16")
    assert (record.tries("hf:bf16", TASKS[0]), record.rate("hf:bf16", TASKS[0])) == (6, None)
    assert "| hf:bf16 | – | – | – | hf 1.0 |" in table.table_of(record)


def test_the_time_of_others_is_measured() -> None:
    watching = Neighbours(os.getpid())
    deadline = time.monotonic() + 0.05
    while time.monotonic() < deadline:
        pass
    assert 0.0 <= watching.cores() <= (os.cpu_count() or 1) + 1


def test_patience_ends_when_the_machine_is_quiet_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 0.5, 1.0, 1.0])
    monkeypatch.setattr(quiet, "busy_seconds", lambda: next(readings))
    monkeypatch.setattr(quiet, "MOMENT_S", 0.0)
    quiet.wait_for_quiet(0.2, patience_s=60.0)
    assert next(readings, None) is None
    quiet.wait_for_quiet(0.2, patience_s=0.0)


def test_models_that_do_not_fit_together_are_loaded_for_their_turn(run: Compare, diary: Path) -> None:
    run("llmc:bf16,hf:bf16", "--memory-gib", "0.000000001")
    loads = [line for line in diary.read_text().splitlines() if " load " in line]
    assert loads == ["llmc load bf16", "hf load bf16"] * 2
    assert timed_lines(diary)[:3] == ["llmc decode 1 3", "llmc decode 4 3", "llmc prefill 9 134"]


def test_holding_waits_for_a_line_before_the_first_sample(
    run: Compare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    run("hf:bf16", "--hold", "60")
    assert capsys.readouterr().err.splitlines() == ["ready: a line on standard input begins", "done for now"]


def test_a_peer_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with PeerProcess(command, tmp_path / "log", tmp_path) as process:
        with pytest.raises(PeerError, match=r"no answer to load in 0 s"):
            process.ask("load", timeout_s=0.1)
        assert process.process.returncode is not None


@pytest.mark.parametrize("text", ["vllm:bf16", "hf:int4", "hf"])
def test_unknown_peers_are_wrong_usage(text: str, run: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(text)
    assert "no peer 'vllm'" in (said := capsys.readouterr().err) or "hf is measured at f32, bf16" in said


def test_the_table_groups_by_bits_and_relates_to_llmc(run: Compare) -> None:
    record = run("hf:bf16,llama.cpp:q8_0,llmc:bf16")
    lines = table.table_of(record).splitlines()
    assert lines[0] == "| opt-125m | decode 1x7 | decode 4x7 | prefill 9 | version |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| llmc:bf16", "| hf:bf16", "| llama.cpp:q8_0"]
    assert lines[3] == (
        "| hf:bf16 | 10.0 (10.0–10.0) ×1.00 | 40.0 (40.0–40.0) ×1.00 | 18.0 (18.0–18.0) ×1.00 | hf 1.0 |"
    )
    assert "×" not in lines[4]


def test_several_records_are_one_table(run: Compare) -> None:
    record = run("llama.cpp:q8_0,llmc:int8")
    lines = table.table_of(record, record).splitlines()
    assert lines[0] == "|  | decode 1x7 | decode 4x7 | prefill 9 | version |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| opt-125m llmc:int8", "| opt-125m llama.cpp:q8_0"] * 2
    page = "<!-- table record.json record.json -->\nold\n<!-- end -->\n<!-- table record.json -->\n<!-- end -->"
    assert record.path
    assert table.with_tables(page, record.path.parent).splitlines().count(lines[2]) == 2


def test_contexts_of_several_lengths_are_tasks_of_their_own(run: Compare) -> None:
    record = run("llmc:bf16", "--context", "7,2")
    assert record.tasks() == ["decode 1x7", "decode 4x7", "decode 1x2", "decode 4x2", "prefill 9"]


def test_the_tables_on_the_page_are_those_of_the_records() -> None:
    page = ROOT / "bench" / "README.md"
    assert table.with_tables(page.read_text(), page.parent) == page.read_text()

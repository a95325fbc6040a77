"""The search for schedules, with a machine and a clock that are made up; and one real measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llmc import schedules
from llmc.cli.main import main
from llmc.compiler.kernel import Call, DType, TensorType
from llmc.compiler.plan import Choice
from llmc.compiler.report import schedule_record
from llmc.compiler.target import LEVELS, Target
from llmc.runtime.errors import LlmcError
from llmc.schedules import records, rules
from llmc.schedules.cpu.linear import rule as linear
from llmc.schedules.cpu.linear import space as linear_space
from llmc.schedules.tuning import tune
from llmc.schedules.tuning.bench import Bench, Sample
from llmc.schedules.tuning.search import Job, search
from tests.runtime.stub_artifact import manifest, write_stub

MACHINE = tune.Machine("a CPU, 2 threads", "0.1.0")
TARGET = Target("cpu", "x86-64-v4+bf16")


def linear_call(m: int = 1, n: int = 256, k: int = 512, weight: DType = "bf16", op: str = "Linear") -> Call:
    inputs = (TensorType((m, k), "f32"), TensorType((n, k), weight, constant=True))
    return Call(f"llmc.{op}", inputs, (TensorType((m, n), "f32"),))


def job(call: Call, target: Target = TARGET) -> Job:
    (found,) = tune.jobs([call], target)
    return found


@dataclass
class Machine:
    """Measures by `ns`; every round takes a second of its clock."""

    ns: Callable[[Any], float]
    seconds: float = 0.0
    clean: bool = True
    stop_after: float = float("inf")

    def __post_init__(self) -> None:
        self.heats: list[list[Any]] = []

    def clock(self) -> float:
        return self.seconds

    def __call__(self, candidates: Sequence[Any], n_rounds: int) -> tuple[list[list[Sample]], dict[str, list[Sample]]]:
        self.heats.append(list(candidates))
        self.seconds += 1
        if self.seconds > self.stop_after:
            raise KeyboardInterrupt
        busy = 1.0 if self.clean else 0.5
        samples = [[Sample(self.ns(params), busy)] * n_rounds for params in candidates]
        return samples, {"read bandwidth": [Sample(500.0)] * n_rounds, "dpbf16": [Sample(100.0)] * n_rounds}


def never() -> bool:
    return False


def test_the_fastest_candidate_is_found_and_what_it_beat_is_told() -> None:
    work = job(linear_call())
    best = next(params for params in work.space if params.panels == 2)
    machine = Machine(lambda params: 600.0 if params == best else 900.0 if params.panels == 2 else 1000.0)
    found = search(work, machine, never)
    assert found.params == best
    assert (found.ns, found.limit, found.share) == (600.0, "read bandwidth", 500.0 / 600.0)
    assert found.default_ratio == 1000.0 / 600.0
    assert found.beat is not None
    assert found.beat.panels == 2
    assert found.beat_ratio == 1.5
    assert found.tried == len({params for heat in machine.heats for params in heat})


def test_what_is_best_on_paper_is_measured_first() -> None:
    work = job(linear_call())
    machine = Machine(lambda params: 1000.0)
    search(work, machine, never)
    first = [params for params in work.space if params != work.default][:4]
    assert machine.heats[0] == [work.default, *first]


def test_later_candidates_are_close_to_the_fastest() -> None:
    work = job(linear_call(m=4))
    best = next(params for params in work.space if params.panels == 2)
    machine = Machine(lambda params: 500.0 if params == best else 1000.0)
    search(work, machine, never)
    assert all(params.rows == best.rows for params in machine.heats[-2])


def test_a_choice_that_is_hardly_faster_is_not_taken() -> None:
    work = job(linear_call())
    found = search(work, Machine(lambda params: 1000.0 if params == work.default else 980.0), never)
    assert found.params == work.default
    assert found.beat_ratio == 0.98


def test_on_a_loaded_machine_the_rules_own_choice_stays() -> None:
    work = job(linear_call())
    found = search(work, Machine(lambda params: 1000.0 if params == work.default else 500.0, clean=False), never)
    assert found.params == work.default
    assert found.clean < 0.5


def test_a_choice_that_wins_some_rounds_only_is_not_taken() -> None:
    work = job(linear_call())

    def measure(candidates: Sequence[Any], n_rounds: int) -> tuple[list[list[Sample]], Mapping[str, list[Sample]]]:
        uneven = [Sample(1300.0 if i % 5 < 2 else 900.0) for i in range(n_rounds)]
        steady = [Sample(1000.0)] * n_rounds
        return [steady if params == work.default else uneven for params in candidates], {"dpbf16": steady}

    assert search(work, measure, never).params == work.default


def test_without_time_the_rules_own_choice_is_measured_alone() -> None:
    machine = Machine(lambda params: 1000.0)
    found = search(job(linear_call()), machine, lambda: True)
    assert (len(machine.heats), found.tried, found.beat) == (1, 1, None)


def run(path: Path, machine: Machine, calls: Sequence[Call], **options: Any) -> tune.Outcome:
    return tune.tune(calls, TARGET, path, MACHINE, lambda work: machine, clock=machine.clock, **options)


CALLS = [linear_call(m=m) for m in (1, 2, 4)]


def test_every_signature_is_tuned_once_and_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    calls = [*CALLS, linear_call(op="LinearResidual"), linear_call(m=8, weight="f32")]
    outcome = run(path, Machine(lambda params: 1000.0), calls)
    assert [record.signature.m for record in outcome.new] == [1, 2, 4, 8]
    assert records.load(path, TARGET) == {record.signature: record for record in outcome.new}
    assert outcome.new[0].share == 0.5
    assert outcome.new[0].machine == MACHINE.name


def test_a_second_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run(path, Machine(lambda params: 1000.0), CALLS[:2])
    outcome = run(path, Machine(lambda params: 1000.0), CALLS)
    assert ([record.signature.m for record in outcome.new], outcome.kept) == ([4], 2)
    assert len(records.load(path, TARGET)) == 3


def test_asked_again_it_measures_everything_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run(path, Machine(lambda params: 1000.0), CALLS)
    outcome = run(path, Machine(lambda params: 2000.0), CALLS, again=True)
    assert {record.time_us for record in records.load(path, TARGET).values()} == {2.0}
    assert (len(outcome.new), outcome.kept) == (3, 0)


def test_records_of_another_machine_or_version_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run(path, Machine(lambda params: 1000.0), CALLS)
    (first, *rest) = records.load(path, TARGET).values()
    records.save(path, TARGET, [records.Record(**{**vars(first), "llmc": "0.0.9"}), *rest])
    assert len(run(path, Machine(lambda params: 1000.0), CALLS).new) == 1


def test_the_budget_is_shared_and_kept(tmp_path: Path) -> None:
    machine = Machine(lambda params: 1000.0)
    outcome = run(tmp_path / "a.json", machine, CALLS, budget=12)
    assert len(outcome.new) == 3
    assert machine.seconds <= 12
    exhausted = run(tmp_path / "b.json", Machine(lambda params: 1000.0), CALLS, budget=0.5)
    assert (len(exhausted.new), exhausted.left) == (1, 2)


def test_interrupted_it_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    machine = Machine(lambda params: 1000.0, stop_after=8)
    outcome = run(path, machine, CALLS)
    assert outcome.interrupted
    assert len(records.load(path, TARGET)) == len(outcome.new) == 3 - outcome.left
    assert 0 < outcome.left < 3


def test_a_damaged_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{")
    machine = Machine(lambda params: 1000.0)
    with pytest.raises(LlmcError, match="damaged"):
        run(path, machine, CALLS)
    assert (machine.heats, path.read_text()) == ([], "{")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 33, 128, 512])
@pytest.mark.parametrize("op", ["Linear", "GatedLinearSilu"])
def test_the_space_holds_the_default_and_one_layout(op: str, m: int, level: str) -> None:
    target = Target("cpu", level)
    call = linear_call(m, 1024, 4096, "bf16", op)
    rule, default = next((rule, p) for rule in rules("cpu") if (p := rule.match(call, target)) is not None)
    space = list(rule.space(call, target))
    assert default in space
    assert len(space) == len(set(space))
    layouts = {str(rule.implement(call, tiles, target).layouts) for tiles in space}
    assert len(layouts) == 1
    layer = linear.parse(call, target)
    assert layer is not None
    assert all(linear_space.cost(layer, tiles) > 0 for tiles in space)


def test_the_kernels_of_a_space_give_the_same_bits_and_are_timed(host: Target, tmp_path: Path) -> None:
    calls = [linear_call(3, 64, 128, op="GatedLinearSilu"), linear_call(1, 64, 128, "f32")]
    with Bench(host, 2) as bench:
        outcome = tune.tune(
            calls, host, tmp_path / "a.json", tune.here(bench, "0"), lambda work: tune.Trial(work, bench), most=3
        )
    assert [record.tried for record in outcome.new] == [3, 3]
    assert all(record.time_us > 0 and record.share > 0 and record.rate > 0 for record in outcome.new)
    assert json.loads((tmp_path / "a.json").read_text())["target"] == str(host)


def test_params_of_a_record_become_the_choice(tmp_path: Path) -> None:
    call = linear_call()
    other = next(params for params in job(call).space if params.panels == 2)
    run(tmp_path / "a.json", Machine(lambda params: 500.0 if params == other else 1000.0), [call])
    tuned = records.Tuned(records.load(tmp_path / "a.json", TARGET))
    chosen = schedules.implement(call, TARGET, tuned)
    assert chosen.params == str(other) != schedules.implement(call, TARGET).params
    assert chosen.measured["params"] == asdict(other)
    assert schedules.implement(call, TARGET).measured == {}
    assert chosen.layouts == schedules.implement(call, TARGET).layouts


def test_the_choice_and_its_record_are_shown_by_inspect(tmp_path: Path) -> None:
    call = linear_call(m=2)
    other = next(params for params in job(call).space if params.panels == 2)
    run(tmp_path / "a.json", Machine(lambda params: 500.0 if params == other else 1000.0), [call])
    tuned = records.Tuned(records.load(tmp_path / "a.json", TARGET))
    choice = Choice(0, 2, call, schedules.implement(call, TARGET, tuned), ("layer.0.o",))
    artifact = write_stub(tmp_path / "a.so", manifest={**manifest(), "schedules": [schedule_record(choice)]})
    text = CliRunner().invoke(main, ["inspect", "--schedules", str(artifact)]).stdout
    assert f"flat GEMM, {other}" in text
    assert "tuned" in text
    assert "the rule's own: 2.00x" in text

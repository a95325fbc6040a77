"""`llmc run --profile`: the trace, the table, and what goes wrong."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

from llmc.cli import machine_limits, profile_table, profile_trace
from llmc.cli.call_facts import contracted, facts_of_plan
from llmc.cli.machine_limits import Limits
from llmc.cli.main import main
from llmc.runtime.artifact import ArtifactFile
from tests.runtime import toy_artifact as toy
from tests.runtime.stub_artifact import manifest, write_stub

N = 6


@pytest.fixture(scope="module")
def toy_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build_artifact(tmp_path_factory.mktemp("toy"))


def run(artifact: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["run", str(artifact), *map(str, arguments)])


def profiled(artifact: Path, trace: Path, *arguments: object) -> tuple[Result, dict[str, Any]]:
    given = ("--tokens", "3,5,9", "-n", N, "--ignore-eos", "--threads", 2, "--profile", trace, *arguments)
    result = run(artifact, *given)
    assert result.exit_code == 0, result.stderr
    said: dict[str, Any] = json.loads(trace.read_text())
    return result, said


def slices(said: Mapping[str, Any], row: str) -> list[dict[str, Any]]:
    events = said["traceEvents"]
    (tid,) = [e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == row]
    return [e for e in events if e["ph"] == "X" and e["tid"] == tid]


def test_the_trace_has_a_row_for_steps_for_kernels_and_for_each_thread(toy_so: Path, tmp_path: Path) -> None:
    _, said = profiled(toy_so, tmp_path / "trace.json")
    steps = [e for e in slices(said, "steps") if e["cat"] == "step"]
    assert [(e["name"], e["args"]["tokens"]) for e in steps] == [("prefill", 3), *[("decode", 1)] * (N - 1)]
    kernels = slices(said, "kernels")
    plan = toy.ToyPlan()
    head = len(plan.head_calls(1))
    assert len(kernels) == len(plan.body_calls(4)) + (N - 1) * len(plan.body_calls(2)) + N * head
    assert kernels[0]["name"] == "embed_4"
    assert {e["name"] for e in slices(said, "thread 0")} <= {e["name"] for e in kernels}
    ends = 0.0
    for kernel in kernels:
        assert kernel["ts"] >= ends - 1e-6
        ends = kernel["ts"] + kernel["dur"]
    assert steps[0]["ts"] == 0.0
    assert ends <= steps[-1]["ts"] + steps[-1]["dur"]


def test_plans_lie_inside_their_step(toy_so: Path, tmp_path: Path) -> None:
    _, said = profiled(toy_so, tmp_path / "trace.json")
    inside = [e for e in slices(said, "steps") if e["cat"] == "plan"]
    assert [e["name"] for e in inside] == ["body of 4", "head of 1", *["body of 2", "head of 1"] * (N - 1)]
    steps = [e for e in slices(said, "steps") if e["cat"] == "step"]
    for step, body in zip(steps, inside[::2], strict=True):
        assert step["ts"] <= body["ts"]
        assert body["ts"] + body["dur"] <= step["ts"] + step["dur"] + 1e-3


def test_shares_and_the_rest_make_up_the_step(toy_so: Path, tmp_path: Path) -> None:
    _, said = profiled(toy_so, tmp_path / "trace.json")
    phases = {phase["phase"]: phase for phase in said["llmc"]["phases"]}
    assert (phases["prefill"]["steps"], phases["decode"]["steps"]) == (1, N - 1)
    for phase in phases.values():
        assert sum(k["ns"] for k in phase["kernels"]) + phase["ns_between_kernels"] == pytest.approx(phase["ns"])
        rest = phase["ns_between_kernels"] / phase["ns"]
        assert sum(k["share"] for k in phase["kernels"]) + rest == pytest.approx(1)
    plans = {(plan["kind"], plan["rows"]): plan for plan in said["llmc"]["plans"]}
    assert {key: plan["runs"] for key, plan in plans.items()} == {("body", 2): N - 1, ("body", 4): 1, ("head", 1): N}
    assert len(plans["body", 2]["calls"]) == len(toy.ToyPlan().body_calls(2))


def test_the_table_goes_to_standard_error_and_the_tokens_do_not_change(toy_so: Path, tmp_path: Path) -> None:
    result, _ = profiled(toy_so, tmp_path / "trace.json")
    assert result.stdout == run(toy_so, "--tokens", "3,5,9", "-n", N, "--ignore-eos").stdout
    lines = result.stderr.splitlines()
    assert any(line.startswith("prefill: 1 step, 3 tokens, ") for line in lines)
    assert any(line.startswith(f"decode: {N - 1} steps, {N - 1} tokens, ") for line in lines)
    assert sum(line.startswith("between kernels") for line in lines) == 2
    assert sum(line.startswith("attend_2") for line in lines) == 1


def test_json_carries_the_sums(toy_so: Path, tmp_path: Path) -> None:
    result, said = profiled(toy_so, tmp_path / "trace.json", "--json")
    printed = json.loads(result.stdout)
    assert printed["profile"]["trace"] == str(tmp_path / "trace.json")
    assert printed["profile"]["phases"] == said["llmc"]["phases"]
    assert len(printed["tokens"]) == N


def test_no_step_at_all_is_an_empty_trace(toy_so: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = CliRunner().invoke(main, ["run", str(toy_so), "-i", "--profile", str(trace)], input="")
    assert result.exit_code == 0
    assert json.loads(trace.read_text())["llmc"]["phases"] == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(toy_so: Path, tmp_path: Path) -> None:
    for place, said in (
        (tmp_path, "the trace's place is a directory"),
        (tmp_path / "no" / "trace.json", f"the trace cannot be written: there is no folder {tmp_path / 'no'}"),
    ):
        result = run(toy_so, "--tokens", "1", "--profile", place)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {said}\n  at: {place}")


def test_a_full_disk_leaves_no_half_of_a_trace(toy_so: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: IO[str], _: object) -> None:
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(profile_trace, "write_events", full)
    result = run(toy_so, "--tokens", "1", "--profile", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert "error: the trace cannot be written: No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_cannot_measure_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    result = run(write_stub(tmp_path / "a.so"), "--tokens", "1", "--profile", tmp_path / "trace.json")
    assert result.exit_code == 1
    assert "the artifact's runtime cannot measure its kernels" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.so"]


# -- what calls are for, and what the machine can ----------------------------------------


def test_a_call_takes_bytes_and_operations_of_its_place_in_the_schedule(tmp_path: Path) -> None:
    said = manifest()
    record = said["schedules"][0] | {"kernels": ["embed"], "kernel_bytes": [640], "kernel_operations": [7], "m": 8}
    weights = [{"name": "model.layers.3.q.weight", "offset": 0, "bytes": 1024, "layout": ""}]
    path = write_stub(tmp_path / "a.so", manifest=said | {"schedules": [record], "weights": weights})
    with ArtifactFile.open(path) as file:
        tables = file.plan()
        bodies = [facts_of_plan(tables, plan, file.manifest()) for plan in tables.plans]
    (known,) = bodies[1]
    assert (known.op, known.work(), known.weight, known.layer) == ("Linear", (640, 7), "model.layers.3.q.weight", 3)
    (unknown,) = bodies[0]
    assert (unknown.op, unknown.work(), unknown.node) == ("", None, -1)


def test_merged_weights_have_one_short_name() -> None:
    assert contracted("{a.q_proj.weight,a.k_proj.weight,a.v_proj.weight}") == "a.{q,k,v}_proj.weight"
    assert contracted("model.norm.weight") == "model.norm.weight"


def test_limits_are_the_fastest_measurement_of_this_machine() -> None:
    records = [
        {"machine": "a", "limit": "read bandwidth", "rate": 30.0},
        {"machine": "a", "limit": "read bandwidth", "rate": 50.0},
        {"machine": "b", "limit": "read bandwidth", "rate": 90.0},
        {"machine": "a", "limit": "dpbf16", "rate": 400.0},
    ]
    limits = machine_limits.limits_of(records, "a")
    assert limits == Limits(50.0, 400.0, "dpbf16", "a")
    assert limits.least_ns(100, 100) == 2.0
    assert limits.least_ns(100, 4000) == 10.0
    assert machine_limits.limits_of(records, "c") is None


def test_arithmetic_is_limited_by_the_instruction_of_the_artifacts_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"machine": "a", "limit": "read bandwidth", "rate": 50.0, "weight": "bf16"},
        {"machine": "a", "limit": "dpbf16", "rate": 400.0, "weight": "bf16"},
    ]
    monkeypatch.setattr(machine_limits, "shipped", lambda target: records)
    bf16 = {"model": {"dtype": "bf16"}}
    assert machine_limits.known_limits(bf16, "a") == Limits(50.0, 400.0, "dpbf16", "a")
    assert machine_limits.known_limits(bf16 | {"quant": {"name": "int8"}}, "a") == Limits(50.0, 0.0, "", "a")
    assert machine_limits.known_limits(bf16, "b") is None


def test_the_table_says_what_is_known_and_no_more() -> None:
    kernel = {"kernel": "linear_m1_0a1b2c3d", "op": "Linear", "calls": 2.0, "ns": 750.0, "share": 0.75}
    known = {"bytes": 3000.0, "operations": 1500.0, "gb_per_s": 4.0, "gflop_per_s": 2.0, "share_of_limit": 0.08}
    phase = {"phase": "decode", "steps": 1, "tokens": 1, "ns": 1000.0, "median_ns": 900.0, "ns_between_kernels": 250.0}
    said = {"limits": Limits(50.0, 0.0, "", "this")._asdict(), "n_lost": 0, "n_unrecorded": 0, "machine": "this"}
    text = profile_table.write(said | {"phases": [phase | {"kernels": [kernel | known]}]})
    assert text.splitlines()[:4] == [
        "decode: 1 step, 1 token, 1 us a step (median 900 ns); of a step on average:",
        "kernel           operator  calls    time   share   bytes  GB/s  GFLOP/s  of limit",
        "linear_m1        Linear        2  750 ns  75.0 %  3.0 kB     4        2     8.0 %",
        "between kernels                   250 ns  25.0 %",
    ]
    unknown = dict.fromkeys(known)
    text = profile_table.write(
        said | {"limits": None, "n_lost": 3, "phases": [phase | {"kernels": [kernel | unknown]}]}
    )
    assert "linear_m1        Linear        2  750 ns  75.0 %" in text
    assert "of limit" not in text
    assert "llmc tune measures them" in text
    assert "3 events found no room" in text

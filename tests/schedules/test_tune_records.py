"""Files of tuned records: round trip, precedence, and everything that can be wrong with them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from llmc import schedules
from llmc.compiler.kernel import Call, TensorType
from llmc.compiler.target import LEVELS, Target
from llmc.passes import rewritten
from llmc.runtime.errors import LlmcError
from llmc.schedules import records, switches
from llmc.schedules.cpu.linear import rule as linear
from llmc.schedules.cuda.linear.gemm_tiles import Tiling
from llmc.schedules.records import Record, Signature, Tuned
from llmc.schedules.switches import Switch
from llmc.schedules.tuning import import_measured as tune_import

TARGET = Target("cpu", "x86-64-v4+bf16")
CALL = Call(
    "llmc.LinearBiasResidual",
    (TensorType((4, 512), "f32"), TensorType((256, 512), "bf16", constant=True), TensorType((256,), "f32", True), None),
    (TensorType((4, 256), "f32"),),
)
SIGNATURE = Signature("Linear", 256, 512, 4, "bf16", 16)


def record(**changes: Any) -> Record:
    default = linear.match(CALL, TARGET)
    assert default is not None
    said = Record(
        signature=SIGNATURE,
        rule="linear",
        params=asdict(default),
        time_us=10.0,
        share=0.9,
        limit="read bandwidth",
        rate=30.0,
        heuristic_us=10.0,
        beat="",
        beat_ratio=0.0,
        tried=1,
        clean=1.0,
        date="2026-01-01",
        machine="a CPU, 2 threads",
        llmc="0.1.0",
    )
    return replace(said, **changes)


def test_a_signature_leaves_the_epilogue_out_and_keeps_the_weight() -> None:
    assert records.signature(CALL, TARGET) == SIGNATURE
    assert str(SIGNATURE) == "Linear bf16 [256, 512] M=4"
    int4 = TensorType((512, 512), "i4", constant=True, group=32)
    gated = Call("llmc.GatedLinearSilu", (TensorType((1, 512), "f32"), int4), (TensorType((1, 256), "f32"),))
    assert records.signature(gated, Target("cpu", "x86-64-v3")) == ("GatedLinear", 512, 512, 1, "i4g32", 8)
    assert records.signature(Call("Add", (None, None), ()), TARGET) is None


def test_a_file_of_records_reads_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    many = [record(signature=SIGNATURE._replace(m=m), share=1.0 / m) for m in (8, 1, 2)]
    many[0] = replace(many[0], in_place="a layer")
    records.save(path, TARGET, many)
    assert path.read_text().count("in_place") == 1
    assert records.load(path, TARGET) == {each.signature: each for each in many}


def test_a_file_has_one_sorted_line_a_record(tmp_path: Path) -> None:
    many = [record(signature=SIGNATURE._replace(m=m)) for m in (8, 1, 2)]
    records.save(tmp_path / "a.json", TARGET, many)
    records.save(tmp_path / "b.json", TARGET, reversed(many))
    text = (tmp_path / "a.json").read_text()
    assert text == (tmp_path / "b.json").read_text()
    assert [json.loads(line.rstrip(","))["m"] for line in text.splitlines()[1:-1]] == [1, 2, 8]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_users_own_records_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "own"))
    name = records.file_name(TARGET)
    other = SIGNATURE._replace(m=1)
    records.save(tmp_path / "shipped" / name, TARGET, [record(), record(signature=other)])
    records.save(tmp_path / "own" / name, TARGET, [record(time_us=5.0)])
    tuned = records.installed(TARGET)
    assert (tuned.records[SIGNATURE].time_us, tuned.records[other].time_us, tuned.notes) == (5.0, 10.0, [])


def test_cards_of_a_target_fill_in_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The H200's records before the H100's, other cards' behind them, a user's own before all."""
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path / "own"))
    gpu, keys = Target("cuda", "sm_90a"), [SIGNATURE._replace(m=m) for m in (1, 2, 4, 8)]
    held = {"nvidia-h200": 1, "nvidia-h100": 2, "nvidia-gh200": 3}
    for at, (card, n) in enumerate(held.items(), 1):
        made = [record(signature=key, time_us=float(at)) for key in keys[:n]]
        records.save(tmp_path / "shipped" / f"{card}.json", gpu, made)
    records.save(tmp_path / "own" / "nvidia-h100.json", gpu, [record(signature=keys[3], time_us=9.0)])
    records.save(tmp_path / "own" / "nvidia-a100.json", Target("cuda", "sm_80"), [record(signature=keys[0])])
    tuned = records.installed(gpu)
    assert [tuned.records[key].time_us for key in keys] == [1.0, 2.0, 3.0, 9.0]
    assert tuned.notes == []


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100"),
        ("../../etc/passwd\0", "etc-passwd"),
        ("", "nvidia-h200"),
    ],
)
def test_records_of_a_gpu_are_called_after_its_card(name: str, card: str) -> None:
    assert records.file_name(Target("cuda", "sm_90a"), name) == f"{card}.json"


def test_the_users_own_lie_in_their_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMC_TUNED", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert records.folder() == tmp_path / "llmc" / "tuned"


def test_without_files_there_are_no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path))
    assert records.installed(TARGET) == Tuned()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"records": []}', '{"target": "cpu:x86-64-v4+bf16", "records": 1}'])
def test_a_damaged_file_is_one_clear_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / records.file_name(TARGET)
    path.write_text(text)
    with pytest.raises(LlmcError, match="damaged"):
        records.load(path, TARGET)
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path))
    tuned = records.installed(TARGET)
    assert tuned.records == {}
    (note,) = tuned.notes
    assert str(path) in note
    assert "\n" not in note


def test_records_of_another_target_are_refused(tmp_path: Path) -> None:
    records.save(tmp_path / "a.json", TARGET, [record()])
    with pytest.raises(LlmcError, match="for cpu:x86-64-v4"):
        records.load(tmp_path / "a.json", Target("cpu", "x86-64-v3"))


@pytest.mark.parametrize("change", [{"m": "4"}, {"params": []}, {"share": None}, {"rule": None}, {"m": True}])
def test_a_record_that_cannot_be_read_is_noted_and_the_rest_is_used(change: dict[str, Any], tmp_path: Path) -> None:
    good, bad = record(), {**record(signature=SIGNATURE._replace(m=1)).to_json(), **change}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"target": str(TARGET), "records": [good.to_json(), bad, 3]}))
    tuned = Tuned()
    assert records.load(path, TARGET, tuned) == {SIGNATURE: good}
    assert len(tuned.notes) == 1


@pytest.mark.parametrize("change", [{"rows": 999}, {"near": "4"}, {"unroll": 2}, {"rows": None}])
def test_params_that_the_rule_does_not_offer_are_ignored_with_a_note(change: dict[str, Any]) -> None:
    tuned = Tuned({SIGNATURE: record(params={**record().params, **change}, heuristic_us=11.0)})
    assert schedules.implement(CALL, TARGET, tuned).measured == {}
    assert schedules.implement(CALL, TARGET, tuned).params == schedules.implement(CALL, TARGET).params
    assert len(tuned.notes) == 1


def test_a_record_that_does_not_know_a_parameter_means_its_default() -> None:
    params = Tiling(16, 11, 96, shared=False)
    said = {name: value for name, value in asdict(params).items() if name != "along"}
    assert records.is_said(params, said)
    assert not records.is_said(replace(params, along=True), said)
    assert not records.is_said(params, {**said, "another": 1})


def test_a_record_of_an_own_choice_that_is_no_longer_the_rules_own_says_nothing() -> None:
    """The new one was not there to be measured; another choice's win over it stands, until it is measured again."""
    near = {"params": {**record().params, "near": 8}}
    was_own, won = Tuned({SIGNATURE: record(**near)}), Tuned({SIGNATURE: record(**near, heuristic_us=11.0)})
    assert schedules.implement(CALL, TARGET, was_own).measured == {}
    assert schedules.implement(CALL, TARGET, was_own).params == schedules.implement(CALL, TARGET).params
    assert schedules.implement(CALL, TARGET, won).measured["params"]["near"] == 8
    assert was_own.notes == won.notes == []


def test_a_record_of_another_rule_is_ignored_with_a_note() -> None:
    tuned = Tuned({SIGNATURE: record(rule="gemv")})
    assert schedules.implement(CALL, TARGET, tuned).measured == {}
    assert len(tuned.notes) == 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmcError, match="cannot be written"):
        records.save(tmp_path / "file" / "a.json", TARGET, [record()])


@pytest.mark.parametrize("level", LEVELS)
def test_the_records_that_come_with_llmc_fit_it(level: str) -> None:
    target = Target("cpu", level)
    tuned = Tuned()
    shipped = records.load(records.SHIPPED / records.file_name(target), target, tuned)
    for key in shipped:
        dtype, _, group = key.weight.partition("g")
        weight = TensorType((key.n, key.k), dtype, True, int(group or 0))  # type: ignore[arg-type]
        op = {"Linear": "llmc.Linear", "GatedLinear": "llmc.GatedLinearSilu"}[key.op]
        call = Call(op, (TensorType((key.m, key.k), "f32"), weight), (TensorType((key.m, key.n), "f32"),))
        assert schedules.implement(call, target, Tuned(shipped, tuned.notes)).measured
    assert tuned.notes == []


# -- switches ----------------------------------------------------------------------------------------------------------

ON = Switch("append_in_product", 1024, 2048, 0.97, 12, "a model", "2026-01-01", "a GPU", "0.1.0")
GPU = Target("cuda", "sm_90a")


def test_switches_lie_beside_records_and_outlive_their_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path))
    path = tmp_path / records.file_name(GPU)
    records.save(path, GPU, [], [ON])
    records.save(path, GPU, [record()])
    tuned = records.installed(GPU)
    assert tuned.switches[ON.name] == ON
    assert record().signature in tuned.records
    assert [tuned.switched(m) for m in (1023, 1024, 2048, 2049)] == [frozenset(), {ON.name}, {ON.name}, frozenset()]
    assert str(ON).startswith("append_in_product: on for 1024 – 2048 rows, 0.970 times as long (a model, 12 pairs")
    records.save(path, GPU, [record()], [])
    assert '"switches"' not in path.read_text()


def test_a_pass_that_saves_too_little_is_off_and_turned_by_hand_it_is_not_what_it_was() -> None:
    off = replace(ON, ratio=0.996)
    assert switches.switched([off], 2048) == frozenset()
    turned = switches.toggled([off], ON.name, 128)
    assert switches.switched([turned], 2048) == {ON.name}
    assert str(turned) == "append_in_product: on for 128 rows and more, to be measured"
    assert switches.switched([switches.toggled([ON], ON.name, 128)], 2048) == frozenset()


def test_switches_that_nobody_knows_or_can_read_are_left_out(tmp_path: Path) -> None:
    path, tuned = tmp_path / "a.json", Tuned()
    lines = [ON.to_json(), {**ON.to_json(), "name": "another"}, {**ON.to_json(), "ratio": "small"}, 3]
    path.write_text(json.dumps({"target": str(GPU), "records": [], "switches": lines}))
    assert records.load_switches(path, GPU, tuned) == {ON.name: ON}
    assert len(tuned.notes) == 1


def test_every_switch_has_a_pass() -> None:
    assert sorted(rewritten.PASSES) == sorted(switches.PASSES)


def test_the_rules_own_choice_with_nothing_beside_it_is_no_record() -> None:
    run = tune_import.Found(rates={"copy bandwidth": 1e9})
    entry = {"rule": "linear", "words": "own", "params": {}, "own": True, "length": 0, "at": 0.0}
    own = {**entry, "us": 2.0, "bytes": 1, "operations": 1}
    other = {**own, "own": False, "us": 1.0, "words": "other"}
    assert tune_import.best_of(SIGNATURE, {"own": [own]}, run, "1") is None
    found = tune_import.best_of(SIGNATURE, {"own": [own], "other": [other]}, run, "1")
    assert found is not None
    assert (found.time_us, found.heuristic_us, found.tried) == (1.0, 2.0, 2)

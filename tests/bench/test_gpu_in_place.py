"""The tuner that measures candidates in their places, on a device whose kernels take what is said here: alone, and less
behind a neighbour that lets them in early."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from llmc.bench.gpu import in_place, measure, plan, work
from llmc.bench.gpu.chain import chains
from llmc.bench.gpu.chains import Step, add_chains, repeated
from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.jobs import Jobs, attention_call, linear_call
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit, call_to_json, write_cubins
from llmc.cli.tune_gpu import records_in_words
from llmc.compiler.kernel import Call, Implementation, Kernel, Launch, Operand
from llmc.compiler.plan import BODY, Choice, PlannedCall, Program, StepPlan
from llmc.compiler.target import Target
from llmc.runtime.format import SPACES, Argument
from llmc.schedules import records, rule_of
from llmc.schedules.records import Record, Signature
from llmc.schedules.tuning import import_measured as tune_import

TARGET = Target("cuda", "sm_90a")
ATTENTION, PRODUCT = attention_call(1, 2, 2, 64, 0, "bf16"), linear_call("LinearResidual", 1, 384, 128, "bf16", 0)
CHAIN = "toy M=1 @40"
ALONE = {"attend": 20.0, "attend_b": 21.0, "multiply": 10.0, "multiply_b": 11.0, "multiply_c": 9.0, "multiply_d": 9.0}
ALONE |= {"attend_small": 20.2, "multiply_small": 10.2}
"""µs of a kernel behind one like it."""
LESS = {("multiply_b", "attend"): 4.0, ("attend", "multiply_c"): -3.0, ("attend", "multiply_d"): 0.9}
LESS |= {("attend_small", "multiply_small"): 2.0}
"""µs that a kernel takes less behind another one."""


class Fake:
    """As bench/gpu/driver.Device.  lost_at: the graph, counted from 1, at which the machine is gone.  wrong: a kernel
    that writes something else than the others."""

    def __init__(self, lost_at: int = 0, wrong: str = "") -> None:
        self.wrong = wrong
        self.recorded: list[str] | None = None
        self.ran: list[str] = []
        self.lost_at, self.n_graphs, self.n_bytes = lost_at, 0, 1

    def facts(self) -> dict[str, Any]:
        return {"free_bytes": 1 << 40}

    @contextmanager
    def kept(self) -> Iterator[None]:
        yield

    def allocate(self, n_bytes: int) -> int:
        self.n_bytes += n_bytes
        return self.n_bytes

    def upload(self, array: Any) -> int:
        return self.allocate(array.nbytes)

    def read(self, address: int, n_bytes: int) -> Any:
        return np.full(n_bytes, 0x3F if self.ran[-1] == self.wrong else 0, np.uint8)

    def fill(self, *_: Any) -> None:
        pass

    copy = wait = fill

    def kernel(self, cubin: bytes, name: str, **_: Any) -> str:
        assert self.recorded is None, "no kernel can be loaded while a stream records"
        return name

    def launch(self, kernel: str, grid: int, pointers: list[int]) -> None:
        if self.recorded is not None:
            self.recorded.append(kernel)
        else:
            self.ran.append(kernel)

    @contextmanager
    def graph(self, record: Callable[[], None]) -> Iterator[Callable[[], None]]:
        self.n_graphs += 1
        if self.n_graphs == self.lost_at:
            raise KeyboardInterrupt
        kernels: list[str] = []
        self.recorded = kernels
        record()
        self.recorded = None
        yield lambda: self.ran.extend(kernels)

    def times_ms(self, run: Callable[[], None], n: int) -> list[float]:
        times = []
        for _ in range(n):
            self.ran = []
            run()
            behind = zip([self.ran[-1], *self.ran], self.ran, strict=False)
            times.append(sum(ALONE[kernel] - LESS.get((before, kernel), 0.0) for before, kernel in behind) / 1e3)
        return times


def candidate(call: Call, kernel: str, layout: str = "Tiles") -> dict[str, Any]:
    operands = [["input", i] for i, kind in enumerate(call.inputs) if kind and "Attention" not in call.op]
    return {
        "params": {"kernel": kernel},
        "words": kernel,
        "launches": [{"kernel": kernel, "grid": 1, "operands": [*operands, ["output", 0]]}],
        "temps": [],
        "scratch_bytes": 0,
        "kv_layer_bytes": 512 * ("Attention" in call.op),
        "layouts": {} if "Attention" in call.op else {"1": {"kind": layout, "dtype": "bf16"}},
        "n_bytes": 1 << 20,
        "n_operations": 1,
    }


def job(call: Call, *kernels: str, **said: Any) -> dict[str, Any]:
    signature = records.signature(call, TARGET)
    assert signature is not None
    return {
        "name": str(signature),
        "rule": "linear",
        "call": call_to_json(call),
        "signature": signature._asdict(),
        "lengths": [40] if "Attention" in call.op else [],
        "of_chain": False,
        "candidates": [candidate(call, kernel) for kernel in kernels],
        **said,
    }


def kit_of(folder: Path, *jobs: dict[str, Any]) -> Kit:
    """A kit whose chain has these calls, two or three, twice."""
    places = [["output", 0, 0], ["kv", 0, 0]], [["input", 0, 0], ["input", 2, 512], ["output", 0, 512]]
    further = [["input", 0, 512], ["output", 0, 2048]]
    steps = [{"job": each["name"], "places": where} for each, where in zip(jobs, [*places, further], strict=False)]
    chain = {"model": "toy", "m": 1, "lengths": [40], "layers": 2, "arena_bytes": 4096, "steps": 2 * steps}
    kernels = {each["words"]: {"n_threads": 1} for each in jobs for each in each["candidates"]}
    settings = {"in_place": [[1, 40]], "l2_bytes": 1 << 10, "shortest_ms": 0.1, "replays": 3}
    folder.mkdir(exist_ok=True)
    said = {"settings": settings, "kernels": kernels, "jobs": jobs, "models": [], "chains": [chain]}
    (folder / "kit.json").write_text(json.dumps(said))
    write_cubins(folder, dict.fromkeys(kernels, b""))
    return Kit(folder)


def done(kit: Kit, journal: Journal, device: Fake, stages: str) -> Journal:
    """All items of these stages, as a process of a kit's run does them."""
    parts = plan.named(stages)
    made: dict[str, work.Run] = {}

    def runner(stage: str) -> Any:
        if stage not in made:
            made[stage] = work.on_device(stage, parts, cast(Device, device), kit, journal, opened)
        return made[stage]

    with ExitStack() as opened:
        assert work.do(parts, runner, kit, journal, time.time() + 60) == work.DONE
    return journal


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return kit_of(tmp_path / "kit", job(ATTENTION, "attend", "attend_b"), job(PRODUCT, "multiply", "multiply_b"))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "results.jsonl")
    journal.append("facts", "device", "done", name="NVIDIA H200", l2_bytes=1 << 10)
    journal.append("limits", "copy", "done", gb_per_s=4000.0)
    return journal


PRODUCT_ITEM = str(records.signature(PRODUCT, TARGET))
ATTENTION_ITEM = str(records.signature(ATTENTION, TARGET))


def test_a_candidate_that_is_slower_alone_and_faster_in_its_place_wins(kit: Kit, journal: Journal) -> None:
    done(kit, journal, Fake(), "tune+in place")
    alone, found = journal.results(measure.STAGE), journal.results(in_place.STAGE)
    assert [alone[f"{PRODUCT_ITEM} #{i}"]["us"] for i in (0, 1)] == [pytest.approx(10), pytest.approx(11)]
    tried = found[f"{CHAIN}: {PRODUCT_ITEM} #1"]
    assert (tried["us"], tried["base_us"]) == (pytest.approx(27), pytest.approx(30))
    best = found[f"{CHAIN}: best"]
    assert (best["us"], best["own_us"]) == (pytest.approx(27), pytest.approx(30))
    assert best["choice"] == {PRODUCT_ITEM: 1}
    (row,) = in_place.rows(kit, journal)
    assert row == (CHAIN, "30.0", "27.0", "10.0 %", f"{PRODUCT_ITEM}: multiply_b")


def test_candidates_that_pay_together_alone_are_found(tmp_path: Path, journal: Journal) -> None:
    """Two small kernels run side by side; beside a large one either is slower."""
    attention = job(ATTENTION, "attend", "attend_b", "attend_small")
    product = job(PRODUCT, "multiply", "multiply_c", "multiply_small", "multiply_d")
    kit = kit_of(tmp_path / "kit", attention, product)
    done(kit, journal, Fake(), "in place")
    found = journal.results(in_place.STAGE)
    together = [found[f"{CHAIN}: together #{index}"] for index in (1, 2)]
    assert [entry["us"] for entry in together] == [pytest.approx(30.0), pytest.approx(28.4)]
    assert found[f"{CHAIN}: {PRODUCT_ITEM} #2"]["others"] == {ATTENTION_ITEM: 2}
    assert found[f"{CHAIN}: best"]["choice"] == {PRODUCT_ITEM: 2, ATTENTION_ITEM: 2}
    (report,) = tune_import.import_records([journal.path], TARGET, tmp_path / "tuned.json", "1")
    assert {record["params"]["kernel"] for record in report["records"]} == {"attend_small", "multiply_small"}


def test_neighbours_that_pay_together_alone_are_found(tmp_path: Path, journal: Journal) -> None:
    """Though a third call's candidate makes up for what they gain where all calls take theirs."""
    kit = kit_of(
        tmp_path / "kit",
        job(ATTENTION, "attend", "attend_small"),
        job(PRODUCT, "multiply", "multiply_small"),
        job(linear_call("Linear", 1, 128, 384, "bf16", 0), "multiply", "multiply_b"),
    )
    done(kit, journal, Fake(), "in place")
    found = journal.results(in_place.STAGE)
    together, pair = (found[f"{CHAIN}: {what} #1"] for what in in_place.SETS)
    assert [together["us"], pair["us"]] == [pytest.approx(39.4), pytest.approx(38.4)]
    assert found[f"{CHAIN}: best"]["choice"] == {PRODUCT_ITEM: 1, ATTENTION_ITEM: 1}


def test_what_won_in_its_place_stands_before_what_was_faster_alone(kit: Kit, journal: Journal, tmp_path: Path) -> None:
    out = tmp_path / "tuned.json"
    done(kit, journal, Fake(), "tune")
    (report,) = tune_import.import_records([journal.path], TARGET, out, "1")
    assert {record["params"]["kernel"] for record in report["records"]} == {"attend", "multiply"}
    done(kit, journal, Fake(), "in place")
    (report,) = tune_import.import_records([journal.path], TARGET, out, "1")
    product, attention = sorted(records.load(out, TARGET).values(), key=lambda record: record.signature)
    assert (product.params, attention.params) == ({"kernel": "multiply_b"}, {"kernel": "attend"})
    assert (product.time_us, product.heuristic_us, product.in_place) == (27.0, 30.0, CHAIN)
    assert (product.beat, product.beat_ratio, product.tried) == ("multiply", 1.111, 2)
    assert attention.time_us == attention.heuristic_us
    assert "2 tuned (2 in place), 1 of them faster" in records_in_words(report)


def test_an_isolated_measurement_replaces_none_in_place_of_this_version(
    kit: Kit, journal: Journal, tmp_path: Path
) -> None:
    out, alone = tmp_path / "tuned.json", Journal(tmp_path / "alone.jsonl")
    alone.take_over(journal.path)
    done(kit, alone, Fake(), "tune")
    done(kit, journal, Fake(), "in place")

    def imported(path: Path, version: str) -> dict[Signature, Record]:
        tune_import.import_records([path], TARGET, out, version)
        return records.load(out, TARGET)

    first = imported(journal.path, "1")
    assert all(record.in_place for record in first.values())
    lengths = {"length": 0, "bytes": 1, "operations": 1, "us": 1.0}
    other = {"op": "Linear", "n": 8, "k": 8, "m": 1, "weight": "bf16", "lanes": 8}
    for index, params in enumerate(({}, {"tokens": 8})):
        said = {"rule": "linear", "words": "", "params": params, "signature": other, "own": not index}
        alone.append("tune", f"other #{index}", "done", **said, **lengths)
    second = imported(alone.path, "1")
    assert len(second) == 3
    assert {key: second[key] for key in first} == first
    assert not any(record.in_place for record in imported(alone.path, "2").values())


def test_a_run_that_is_cut_off_goes_on_with_what_won(tmp_path: Path, journal: Journal) -> None:
    """The next call is measured beside the winner of the one before, which another process has found."""
    attention = job(ATTENTION, "attend", "attend_b")
    product = job(PRODUCT, "multiply", "multiply_c", "multiply_b", "multiply_d")
    kit = kit_of(tmp_path / "kit", attention, product)
    whole, cut = Journal(tmp_path / "whole.jsonl"), Journal(tmp_path / "cut.jsonl")
    for each in (whole, cut):
        each.take_over(journal.path)
    done(kit, whole, Fake(), "in place")
    first = list(in_place.items(kit))
    assert first[1] == f"{CHAIN}: together #1"
    assert first[2].startswith(f"{CHAIN}: {PRODUCT_ITEM}")  # the more expensive call
    for lost_at in range(2, 5):
        with pytest.raises(KeyboardInterrupt):
            done(kit, cut, Fake(lost_at), "in place")
    assert 0 < len(cut.results(in_place.STAGE)) < len(first)
    done(kit, cut, Fake(), "in place")
    kept = ("us", "base_us", "own_us", "others", "choice")
    found = [
        {item: {k: v for k, v in entry.items() if k in kept} for item, entry in each.results(in_place.STAGE).items()}
        for each in (whole, cut)
    ]
    assert found[0] == found[1]
    assert found[0][f"{CHAIN}: {ATTENTION_ITEM} #1"]["others"] == {PRODUCT_ITEM: 2}
    events = [entry["event"] for entry in cut.entries() if entry["stage"] == in_place.STAGE]
    assert events.count("done") == len(first)


def test_a_gain_that_noise_explains_or_the_whole_refutes_is_none(kit: Kit, journal: Journal, tmp_path: Path) -> None:
    done(kit, journal, Fake(), "in place")
    known = journal.results(in_place.STAGE)
    (chain,) = chains(kit)
    item = f"{CHAIN}: {PRODUCT_ITEM} #1"
    assert in_place.winners(chain, known) == {PRODUCT_ITEM: 1}
    assert in_place.winners(chain, {**known, item: {**known[item], "noise": 0.2}}) == {}
    assert in_place.winners(chain, {**known, item: {**known[item], "us": 29.9}}) == {}
    best = known[f"{CHAIN}: best"]
    rest = {key: value for key, value in best.items() if key not in ("stage", "item", "event", "at", "us")}
    journal.append(in_place.STAGE, f"{CHAIN}: best", "done", us=best["own_us"], **rest)
    (report,) = tune_import.import_records([journal.path], TARGET, tmp_path / "tuned.json", "1")
    assert {record["params"]["kernel"] for record in report["records"]} == {"attend", "multiply"}


def test_candidates_whose_weight_lies_otherwise_are_left_out(tmp_path: Path) -> None:
    """The artifact has one layout for all numbers of rows."""
    product = job(PRODUCT, "multiply", "multiply_b", "multiply_c", "multiply_d")
    for index in (1, 3):
        product["candidates"][index] = candidate(PRODUCT, "multiply_b", "GatedTiles")
    kit = kit_of(tmp_path / "kit", job(ATTENTION, "attend", "attend_b", "attend_small"), product)
    tried = ["together #2", f"{ATTENTION_ITEM} #1", f"{ATTENTION_ITEM} #2", f"{PRODUCT_ITEM} #2"]
    items = [item.removeprefix(f"{CHAIN}: ") for item in in_place.items(kit)]
    assert (items[0], sorted(items[1:-1]), items[-1]) == ("own", sorted(tried), "best")
    product["candidates"][2] = product["candidates"][1]
    kit = kit_of(tmp_path / "another", job(ATTENTION, "attend"), product)
    assert list(in_place.items(kit)) == [f"{CHAIN}: own"]


def test_a_chain_that_was_cut_off_does_not_hide_candidates_of_another(
    kit: Kit, journal: Journal, tmp_path: Path
) -> None:
    done(kit, journal, Fake(), "in place")
    for item, entry in journal.results(in_place.STAGE).items():
        if entry["of"] != "best" and ATTENTION_ITEM not in item:
            rest = {key: value for key, value in entry.items() if key not in ("stage", "item", "event", "at")}
            rest |= {"chain": "cut off", "us": 1.0}
            journal.append(in_place.STAGE, item.replace(CHAIN, "cut off"), "done", **rest)
    (report,) = tune_import.import_records([journal.path], TARGET, tmp_path / "tuned.json", "1")
    assert [(record["in_place"], record["heuristic_us"]) for record in report["records"]] == [
        (CHAIN, 27.0 if "Attention" in record["op"] else 30.0) for record in report["records"]
    ]


def test_kernels_that_are_wrong_are_not_put_in_place(kit: Kit, journal: Journal) -> None:
    part = plan.IN_PLACE
    everything = work.waiting(part, kit, journal)
    journal.append("tune", f"{ATTENTION_ITEM} @40 #1", "failed", error="another result")
    rest = [item for item in everything if ATTENTION_ITEM not in item and "together" not in item]
    assert work.waiting(part, kit, journal) == rest
    for index, us in enumerate((10.0, 12.9)):  # not so much slower alone that its place could not make up for it
        journal.append("tune", f"{PRODUCT_ITEM} #{index}", "done", us=us)
    assert work.waiting(part, kit, journal) == rest
    journal.append("tune", f"{PRODUCT_ITEM} #1", "done", us=13.1)
    assert len(work.waiting(part, kit, journal)) == len(rest) - 1
    journal.append("tune", f"{PRODUCT_ITEM} #1", "done", us=10.0)
    journal.append("in place", f"another: {PRODUCT_ITEM} #1", "failed", error="hangs")
    assert work.waiting(part, kit, journal) == [item for item in rest if PRODUCT_ITEM not in item]


def test_a_candidate_with_another_result_is_not_timed(kit: Kit, journal: Journal) -> None:
    done(kit, journal, Fake(wrong="multiply_b"), "in place")
    found = journal.latest(in_place.STAGE)[f"{CHAIN}: {PRODUCT_ITEM} #1"]
    assert "another result than the first candidate's" in found["error"]
    assert journal.results(in_place.STAGE)[f"{CHAIN}: best"]["choice"] == {}


@pytest.mark.parametrize("wrong", [("check", f"{PRODUCT_ITEM} #0"), ("in place", f"{CHAIN}: own")])
def test_a_chain_that_does_not_run_is_left_alone(wrong: tuple[str, str], kit: Kit, journal: Journal) -> None:
    journal.append(*wrong, "failed", error="wrong")
    assert work.waiting(plan.IN_PLACE, kit, journal) == []


# -- what a kit carries -----------------------------------------------------------------------------------------------


def test_layers_that_are_alike_make_a_chain() -> None:
    one, other = (Step(replace(ATTENTION, op=f"{n}PagedAttention"), (("kv", 0, n),)) for n in (1, 2))
    first = Step(one.call, (("kv", 0, 0),))
    assert repeated([]) == []
    assert repeated([[first]]) == [[first]]
    assert repeated([[first], *[[one]] * 7]) == [[one]] * 4
    assert repeated([[one], [other]] * 6) == [[other], [one]] * 2
    assert repeated([[one]] * 7 + [[other]]) == []


def test_calls_of_one_signature_that_differ_behind_the_sum_are_jobs_of_their_own() -> None:
    """OPT's products have biases, where Llama's of the same shape have none."""
    kernel = Kernel("k", "k", str)
    arena, weights = SPACES.index("arena"), SPACES.index("weights")

    def program(product: Call) -> Program:
        calls, choices, planned = [ATTENTION, product, ATTENTION], [], []
        for node, call in enumerate(calls):
            operands = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
            made = Implementation((Launch(kernel, operands),))
            choices.append(Choice(BODY, 1, call, made, (str(node),)))
            arguments = (Argument(arena, node, 4), Argument(weights, 0, 4), Argument(arena, node + 1, 4))
            planned.append(PlannedCall(0, 1, arguments, str(node), 0, 0))
        said = {"plans": (StepPlan(BODY, 1, tuple(planned)),), "choices": choices, "n_context": 64, "arena_bytes": 9}
        return cast(Program, SimpleNamespace(**said))

    jobs = Jobs(TARGET, {}, {})
    (chain,) = add_chains(jobs, "one", program(PRODUCT), 1, [(1, 40), (1, 128), (2, 40)])
    assert (chain["lengths"], chain["layers"], chain["arena_bytes"]) == ([40], 1, 9)
    assert [step["job"] for step in chain["steps"]] == [ATTENTION_ITEM, PRODUCT_ITEM]
    assert chain["steps"][1]["places"] == (("input", 0, 1), ("output", 0, 2))
    biased = linear_call("LinearBiasResidual", 1, 384, 128, "bf16", 0)
    (again,) = add_chains(jobs, "other", program(biased), 1, [(1, 40)])
    assert [step["job"] for step in again["steps"]] == [ATTENTION_ITEM, f"{PRODUCT_ITEM} of other"]
    assert all(said["of_chain"] for said in jobs.said.values())


def test_what_a_record_says_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the rule's own choice, however few candidates are asked for."""
    call = linear_call("LinearResidual", 1, 384, 128, "bf16", 0)
    rule, own = rule_of(call, TARGET)
    *_, last = rule.space(call, TARGET)
    jobs = Jobs(TARGET, {}, {})
    monkeypatch.setattr(jobs.tuned, "choose", lambda *_: (last, None))
    jobs.add("product", call, 2)
    assert [each["params"] for each in jobs.said["product"]["candidates"]] == [asdict(own), asdict(last)]
    jobs = Jobs(TARGET, {}, {})
    jobs.add("product", call, 2)
    assert jobs.said["product"]["candidates"][0]["params"] == asdict(own)

"""The plan of a decode step of the published models, on paper: few launches, and no byte more than it must move."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.compiler import driver, report
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.plan import BODY, HEAD, JOINED, Program
from llmc.compiler.quantization.quantize import Scheme
from llmc.compiler.rewrite import rewrite
from llmc.compiler.target import Target
from llmc.schedules import records

HOPPER = Target("cuda", "sm_90a")
BATCH = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(scope="module", params=["llama2-7b", "opt-6.7b"])
def source(request: pytest.FixtureRequest) -> SourceModel:
    return load_source(request.param, "random", "bf16")


@pytest.fixture(scope="module")
def planned(source: SourceModel) -> tuple[Program, int, int]:
    """The program, its layers, and the bytes of the weights that a step reads whole."""
    tables = ("embed_tokens", "embed_positions")
    weights = [w for name, w in source.weights.items() if not any(table in name for table in tables)]
    n_bytes = sum(weight.stored_bytes for weight in weights)
    if source.config["model_type"] == "opt":  # the embedding makes the logits too
        n_bytes += sum(w.stored_bytes for name, w in source.weights.items() if "embed_tokens" in name)
    step_graph, _ = rewrite(source, None, None, "cuda")
    program = driver.plan(step_graph, source, HOPPER, BATCH, "bf16")
    return program, program.n_layers, n_bytes


@pytest.mark.parametrize("batch", BATCH)
def test_a_decode_step_has_few_launches_a_layer(planned: tuple[Program, int, int], batch: int) -> None:
    """Five: no norm has one of its own, but for the first."""
    program, n_layers, _ = planned
    (body,) = (plan for plan in program.plans if plan.kind == BODY and plan.n_rows == batch)
    assert len(body.calls) <= 5 * n_layers + 5


@pytest.mark.parametrize(("batch", "activations"), [(1, 0.0), (8, 0.0), (16, 0.0), (32, 0.0), (64, 0.02)])
def test_a_step_reads_every_weight_once(planned: tuple[Program, int, int], batch: int, activations: float) -> None:
    """activations: of 64 tokens they come to more than a fiftieth of the weights."""
    program, _, n_bytes = planned
    step = [plan for plan in program.plans if plan.n_rows == batch and plan.kind in (BODY, HEAD)]
    moved = sum(call.n_bytes for plan in step for call in plan.calls if "Linear" in call.node)
    assert moved == pytest.approx(n_bytes * (1 + activations), rel=0.03)


def test_what_was_measured_of_prompts_is_chosen(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that the rules offer no longer would be left out without a word, but for a note."""
    monkeypatch.setenv("LLMC_TUNED", str(tmp_path))
    tuned = records.installed(HOPPER)
    step_graph, _ = rewrite(source, None, None, "cuda")
    program = driver.plan(step_graph, source, HOPPER, (1,), "bf16", tuned)
    measured = {choice.n_rows for choice in program.choices if choice.implementation.measured}
    assert measured >= {128, 512, 2048}
    assert tuned.notes == []


@pytest.mark.parametrize("batch", [1, 8, 16, 64, 128])
def test_a_norm_is_prepared_where_it_is_applied_to_sums(planned: tuple[Program, int, int], batch: int) -> None:
    """Behind every sum but the last, whose norm is the head's; with many tokens behind none."""
    program, n_layers, _ = planned
    (body,) = (plan for plan in program.plans if plan.kind == BODY and plan.n_rows == batch)
    names = [program.kernels[call.kernel].name for call in body.calls]
    for word in ("_moments_", "_deferred_"):
        assert sum(word in name for name in names) == (2 * n_layers - 1 if batch <= 64 else 0)


@pytest.mark.parametrize("batch", BATCH)
def test_a_joined_step_has_two_launches_less(planned: tuple[Program, int, int], batch: int) -> None:
    """Nothing picks rows, and the last norm is prepared by the product in front of the head, as others are."""
    program, n_layers, _ = planned
    plans = {plan.kind: plan for plan in program.plans if plan.n_rows == batch}
    names = [program.kernels[call.kernel].name for call in plans[JOINED].calls]
    assert len(names) == len(plans[BODY].calls) + len(plans[HEAD].calls) - 2
    for word in ("_moments_", "_deferred_"):
        assert sum(word in name for name in names) == 2 * n_layers


def test_what_a_step_reads_of_a_sequence_is_counted_once(planned: tuple[Program, int, int]) -> None:
    """Though attention stands in bodies and in joined steps of as many rows."""
    program, n_layers, _ = planned
    assert [read["layers"] for read in report.cache_record(program, "bf16")["reads"]] == [n_layers]


def test_what_attention_does_not_turn_comes_rounded_in_prompts(
    planned: tuple[Program, int, int], source: SourceModel
) -> None:
    choices = [choice for choice in planned[0].choices if choice.call.op.endswith("PagedAttention")]
    rounded = {choice.n_rows: qkv.tiled for choice in choices if (qkv := choice.call.inputs[0])}
    assert rounded == {m: m > 64 and source.name == "opt-6.7b" for m in rounded}
    assert {64, 512} <= rounded.keys()


def test_an_int8_cache_is_about_half_of_what_attention_reads(
    planned: tuple[Program, int, int], source: SourceModel
) -> None:
    """A key or value of 128 elements takes 132 bytes in a page, and not 256."""
    step_graph, _ = rewrite(source, None, None, "cuda")
    coded, plain = driver.plan(step_graph, source, HOPPER, (8,), "int8"), planned[0]
    assert coded.kv_page_bytes / plain.kv_page_bytes == 132 / 256
    for n_rows in (8, 512):
        read = []
        for program in (coded, plain):
            (body,) = (plan for plan in program.plans if plan.kind == BODY and plan.n_rows == n_rows)
            *_, attends = (call for call in body.calls if "Attention" in call.node)  # behind what fills the pages
            read.append(attends.n_bytes)
        assert read[0] / read[1] < 0.53 if n_rows == 8 else read[0] < read[1]


@pytest.fixture(scope="module")
def by_scheme() -> dict[str, Program]:
    """Llama-2-7B planned for decode, by how its weights are quantised."""
    programs = {}
    for name in ("none", "int8", "fp8", "int4"):
        source = load_source("llama2-7b", "random", "bf16")
        step_graph, _ = rewrite(source, Scheme.parse(name), None, "cuda")
        programs[name] = driver.plan(step_graph, source, HOPPER, (1, 8, 16, 32, 64), "bf16")
    return programs


@pytest.mark.parametrize(("batch", "deferred"), [(1, True), (8, True), (16, False), (32, True)])
@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_few_tokens_of_quantised_weights_prepare_their_norms(
    by_scheme: dict[str, Program], batch: int, deferred: bool, scheme: str
) -> None:
    """All but the model's first, which follows no product, and the last, whose rows a head may want to pick; in a
    joined step that one too, though the head's weight is in bf16."""
    (body,) = (plan for plan in by_scheme[scheme].plans if plan.n_rows == batch and plan.kind == BODY)
    names = [by_scheme[scheme].kernels[call.kernel].name for call in body.calls]
    for word in ("_moments_", "_deferred_"):
        assert sum(word in name for name in names) == 63 * deferred
    (joined,) = (plan for plan in by_scheme[scheme].plans if plan.n_rows == batch and plan.kind == JOINED)
    assert sum("_deferred_" in by_scheme[scheme].kernels[call.kernel].name for call in joined.calls) == 64 * deferred


@pytest.mark.parametrize("batch", [32, 64])
@pytest.mark.parametrize(("scheme", "bytes_a_weight"), [("int8", 1.0), ("fp8", 1.0), ("int4", 0.5625)])
def test_a_step_of_a_batch_reads_codes_alone_in_as_many_launches(
    by_scheme: dict[str, Program], batch: int, scheme: str, bytes_a_weight: float
) -> None:
    """The weights of 32 layers: four of 4096 x 4096, three of 4096 x 11008."""
    plain, quantised = (
        [plan for plan in by_scheme[name].plans if plan.n_rows == batch and plan.kind == BODY]
        for name in ("none", scheme)
    )
    assert [len(plan.calls) for plan in plain] == [len(plan.calls) for plan in quantised]
    n_weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    moved, of_bf16 = (
        sum(call.n_bytes for plan in plans for call in plan.calls if "Linear" in call.node)
        for plans in (quantised, plain)
    )
    assert of_bf16 - moved == pytest.approx((2 - bytes_a_weight) * n_weights, rel=0.01)

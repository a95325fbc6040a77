"""The plan of a decode step of the published models, on paper: few launches, and no byte more than it must move."""

from __future__ import annotations

import pytest

from llmc.compiler import driver
from llmc.compiler.frontend import SourceModel, load_source
from llmc.compiler.plan import BODY, HEAD, Program
from llmc.compiler.target import Target

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
    step_graph, _ = driver.rewrite(source, None, None, "cuda")
    return driver.plan(step_graph, source, HOPPER, BATCH, "bf16"), source.n_layers, n_bytes


@pytest.mark.parametrize("batch", BATCH)
def test_a_decode_step_has_five_launches_a_layer(planned: tuple[Program, int, int], batch: int) -> None:
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


@pytest.mark.parametrize("batch", [1, 8, 16, 64, 128])
def test_a_norm_is_prepared_where_it_is_applied_to_sums(planned: tuple[Program, int, int], batch: int) -> None:
    """Behind every sum but the last, whose norm is the head's; with few tokens, and with many, behind none."""
    program, n_layers, _ = planned
    (body,) = (plan for plan in program.plans if plan.kind == BODY and plan.n_rows == batch)
    names = [program.kernels[call.kernel].name for call in body.calls]
    for word in ("_moments_", "_deferred_"):
        assert sum(word in name for name in names) == (2 * n_layers - 1 if 8 < batch <= 64 else 0)


def test_an_int8_cache_is_about_half_of_what_attention_reads(
    planned: tuple[Program, int, int], source: SourceModel
) -> None:
    """A key or value of 128 elements takes 132 bytes in a page, and not 256."""
    step_graph, _ = driver.rewrite(source, None, None, "cuda")
    coded, plain = driver.plan(step_graph, source, HOPPER, (8,), "int8"), planned[0]
    assert coded.kv_page_bytes / plain.kv_page_bytes == 132 / 256
    for n_rows in (8, 512):
        read = []
        for program in (coded, plain):
            (body,) = (plan for plan in program.plans if plan.kind == BODY and plan.n_rows == n_rows)
            read.append(max(call.n_bytes for call in body.calls if "Attention" in call.node))
        assert read[0] / read[1] < 0.53 if n_rows == 8 else read[0] < read[1]

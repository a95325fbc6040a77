"""Models that read texts whole, on a GPU through the fake driver: no token is chosen, and heads know positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.plan import unpack_plan
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_whole import WholePlan
from tests.runtime.toy_cuda import SM_90A, FakeCuda, ToyCudaPlan, build_code, sections
from tests.runtime.toy_model import Model

BODY, HEAD = 1 + 3 * toy.LAYERS, 2
BODIES = (4, 16, 64)


class WholeCudaPlan(WholePlan):
    """Bodies and heads, and nothing that chooses."""

    kernel_record = ToyCudaPlan.kernel_record

    def __init__(self) -> None:
        super().__init__(BODIES)
        self.header = self.header._replace(device=fmt.DEVICES.index("cuda"), cuda_arch=SM_90A)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Path]:
    folder = tmp_path_factory.mktemp("whole")
    code = build_code(folder)

    def write(plan: bytes) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.so"
        path.write_bytes(toy.pack_sections(sections(code, plan=plan)))
        return path

    return write


@pytest.fixture
def model(cuda: FakeCuda, written: Callable[[bytes], Path]) -> Iterator[Model]:
    with Model(written(WholeCudaPlan().pack()), kv_tokens=640) as model:
        cuda.calls()
        yield model


def test_texts_share_a_step_and_none_is_cut(model: Model, cuda: FakeCuda) -> None:
    lengths = (30, 30, 11, 3)
    sequences = [model.sequence() for _ in lengths]
    model.step([(sequence, TEXT[:n]) for sequence, n in zip(sequences, lengths, strict=True)])
    assert [line for line in cuda.calls() if line.startswith("graph")] == [f"graph {n}" for n in (BODY, HEAD) * 2]
    assert [sequence.logits() for sequence in sequences] == [toy.oracle(TEXT[:n])[-1] for n in lengths]


def test_a_head_by_itself_gets_rows_and_positions(model: Model, cuda: FakeCuda) -> None:
    (rows,) = model.step([(model.sequence(), TEXT[:6])], all_logits=True)
    assert rows == [number for row in toy.oracle(TEXT[:6]) for number in row]
    copies = [line for line in cuda.calls() if line.startswith("h2d")]
    assert copies[1:] == [f"h2d {64 + 4 * BODIES[-1]}"], "rows [4], rounded up, and positions"


def test_a_plan_that_chooses_tokens_is_refused(cuda: FakeCuda, written: Callable[[bytes], Path]) -> None:
    plan = ToyCudaPlan(BODIES)
    plan.header = plan.header._replace(n_tokens=toy.VOCAB, is_whole=True)
    with pytest.raises(LlmcError, match="has kind 2"):
        llmc.load(written(plan.pack()))
    with pytest.raises(LlmcError, match="the plans are body, head, sampler"):
        unpack_plan(plan.pack(), len(toy.weights_section()), "x")

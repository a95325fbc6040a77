"""Adapters on a GPU, through the fake driver: which plans a step takes, and what of its rows goes along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import llmc
from llmc.runtime import LlmcError
from llmc.runtime import format as fmt
from llmc.runtime.binding import Model
from llmc.runtime.plan import unpack_plan
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_cuda import FakeCuda, ToyCudaPlan, build_code, sections, told

BODY, HEAD = 1 + 3 * toy.LAYERS, 3
JOINED = BODY + HEAD - 1
NAMES = ("sql", "chat")
ADAPTED, JOINED_ADAPTED = (fmt.PLAN_KINDS.index(kind) for kind in ("adapted", "joined adapted"))


class AdaptedPlan(ToyCudaPlan):
    """The toy's, with a joined step of 4 tokens, and each body and joined step once more, in which a row's elements
    grow by its adapter.  adapted: rows of the bodies that are there once more; joined: those of the joined steps."""

    def __init__(self, adapted: Sequence[int] = toy.BODIES, joined: Sequence[int] = (4,)) -> None:
        super().__init__()
        self.header = self.header._replace(adapters=NAMES)
        self.add_plan(fmt.PLAN_KINDS.index("joined"), 4, self.joined_calls(self.body_calls(4)))
        for m in adapted:
            self.add_plan(ADAPTED, m, self.adapted_calls(m))
        for m in joined:
            self.add_plan(JOINED_ADAPTED, m, self.joined_calls(self.adapted_calls(4)))

    def adapted_calls(self, m: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        embed, *layers = self.body_calls(m)
        return [embed, (f"adapt_{m}", m, [embed[2][2], ("adapters", 0, 4 * m)]), *layers]

    def joined_calls(
        self, body: list[tuple[str, int, list[tuple[str, int, int]]]]
    ) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        _, (project, grid, (_, *rest)), (choose, n, (logits, *_)) = self.head_calls(4)
        x = ("arena", 0, 4 * 4 * toy.CHANNELS)
        return [*body, (project, grid, [x, *rest]), (choose, n, [logits, *told(4)])]


def written(path: Path, plan: ToyCudaPlan) -> Path:
    path.write_bytes(toy.pack_sections(sections(build_code(path.parent), plan=plan.pack())))
    return path


@pytest.fixture(scope="module")
def adapted_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("adapted") / "toy.so", AdaptedPlan())


@pytest.fixture
def model(cuda: FakeCuda, adapted_so: Path) -> Iterator[Model]:
    with llmc.load(adapted_so, kv_tokens=640) as model:
        cuda.calls()
        yield model


def oracle(text: Sequence[int], adapter: str | None) -> list[int]:
    more = 1 + NAMES.index(adapter) if adapter else 0
    return toy.oracle_of([[value + more for value in toy.TABLE[token]] for token in text])[-1]


def test_its_plan_is_read_without_a_gpu() -> None:
    tables = unpack_plan(AdaptedPlan().pack(), len(toy.weights_section()), "x")
    assert (tables.header.adapters, tables.header.device) == (NAMES, 1)


def graphs(cuda: FakeCuda) -> list[str]:
    return [line for line in cuda.calls() if line.startswith("graph")]


def test_a_step_takes_the_plans_of_adapters_where_a_row_has_one(model: Model, cuda: FakeCuda) -> None:
    for adapter, more in ((None, 0), ("sql", 1), ("chat", 1)):
        with model.sequence(adapter) as sequence:
            sequence.feed(TEXT[:3])
            assert graphs(cuda) == [f"graph {BODY + more}", f"graph {HEAD}"]
            sequence.feed(TEXT[3:4])
            assert graphs(cuda) == [f"graph {BODY + more + HEAD}"]
            assert sequence.logits().tolist() == oracle(TEXT[:4], adapter)


@pytest.mark.parametrize("names", [(None, None, None, None), (None, "chat", "sql", None)])
def test_joined_steps_have_one_of_either_kind(model: Model, cuda: FakeCuda, names: Sequence[str | None]) -> None:
    sequences = [model.sequence(name) for name in names]
    for i, sequence in enumerate(sequences):
        sequence.feed(TEXT[i : i + 5])
    cuda.calls()
    model.step([(sequence, [TEXT[i + 5]]) for i, sequence in enumerate(sequences)])
    assert graphs(cuda) == [f"graph {JOINED + any(names)}"]
    for i, (sequence, name) in enumerate(zip(sequences, names, strict=True)):
        assert sequence.logits().tolist() == oracle(TEXT[i : i + 6], name)


def test_running_ahead_carries_adapters(model: Model) -> None:
    """Both turns of the input have them."""
    for name in ("sql", None, "chat"):
        text = [*TEXT[:5]]
        for token in model.tokens(TEXT[:5], 7, ignore_eos=True, adapter=name):
            logits = oracle(text, name)
            assert token == logits.index(max(logits))
            text.append(token)


def test_kernels_one_by_one_say_the_same(cuda: FakeCuda, adapted_so: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_SYNC", "1")
    with llmc.load(adapted_so) as model, model.sequence("chat") as sequence:
        sequence.feed(TEXT[:6])
        assert sequence.logits().tolist() == oracle(TEXT[:6], "chat")
    assert not [line for line in cuda.calls() if line.startswith("graph")]


@pytest.mark.parametrize(("adapted", "joined"), [((2, 4), (4,)), ((), (4,)), ((2, 4, 64), (4,)), ((2, 4, 16), ())])
def test_plans_that_are_missing_are_refused(
    cuda: FakeCuda, tmp_path: Path, adapted: Sequence[int], joined: Sequence[int]
) -> None:
    plan = AdaptedPlan(adapted, joined)
    with pytest.raises(LlmcError, match="lacks plans for steps with an adapter"):
        llmc.load(written(tmp_path / "toy.so", plan))
    with pytest.raises(LlmcError, match="the plan section is not valid"):
        unpack_plan(plan.pack(), len(toy.weights_section()), "x")


def test_plans_of_adapters_that_there_are_not_are_refused(cuda: FakeCuda, tmp_path: Path) -> None:
    plan = AdaptedPlan()
    plan.header = plan.header._replace(adapters=())
    with pytest.raises(LlmcError, match="has kind 5 and 2 rows"):
        llmc.load(written(tmp_path / "toy.so", plan))
    with pytest.raises(LlmcError, match="the plan section is not valid"):
        unpack_plan(plan.pack(), len(toy.weights_section()), "x")

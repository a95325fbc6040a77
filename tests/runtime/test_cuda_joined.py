"""Joined steps on a GPU, through the fake driver: when one takes the place of a body and a head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmc.runtime.artifact import ArtifactFile
from tests.runtime import toy_artifact as toy
from tests.runtime.test_advance import SENT, best, check, follow
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_cuda import FakeCuda, ToyCudaPlan, build_code, sections, told
from tests.runtime.toy_model import FORMAT, Model, Refused, Text

BODY, HEAD = 1 + 3 * toy.LAYERS, 3
JOINED = BODY + HEAD - 1
KIND = 3


class JoinedPlan(ToyCudaPlan):
    """With a joined step of 4 tokens, which picks no rows.  tells: whether it says what it chooses."""

    def __init__(self, heads: Sequence[int] = toy.HEADS, *, tells: bool = True) -> None:
        super().__init__(heads=heads)
        _, (project, grid, (_, *rest)), (choose, n, chosen) = self.head_calls(4)
        x = ("arena", 0, 4 * 4 * toy.CHANNELS)
        end = (choose, n, chosen if tells else [chosen[0], *told(4)[:2], chosen[1]])
        self.add_plan(KIND, 4, [*self.body_calls(4), (project, grid, [x, *rest]), end])


def written(path: Path, plan: ToyCudaPlan) -> Path:
    path.write_bytes(toy.pack_sections(sections(build_code(path.parent), plan=plan.pack())))
    return path


@pytest.fixture(scope="module")
def joined_so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("joined") / "toy.so", JoinedPlan())


@pytest.fixture
def model(cuda: FakeCuda, joined_so: Path) -> Iterator[Model]:
    with Model(joined_so, kv_tokens=640) as model:
        cuda.calls()
        yield model


def begun(model: Model, cuda: FakeCuda, n: int) -> tuple[list[Text], list[list[int]]]:
    texts = [TEXT[i : i + 5 + i] for i in range(n)]
    sequences = [model.sequence(text) for text in texts]
    cuda.calls()
    return sequences, texts


@pytest.mark.parametrize("n", [3, 4])
def test_a_token_of_each_sequence_is_a_joined_step(model: Model, cuda: FakeCuda, n: int) -> None:
    """Three are padded."""
    sequences, texts = begun(model, cuda, n)
    for text in texts:
        text.append(7)
    model.step([(sequence, [7]) for sequence in sequences])
    assert [line for line in cuda.calls() if line.startswith("graph")] == [f"graph {JOINED}"]
    check(sequences, texts)


def test_all_tokens_whose_logits_are_wanted_are_too(model: Model, cuda: FakeCuda) -> None:
    text = model.sequence()
    (said,) = model.step([(text, TEXT[:4])], all_logits=True)
    assert f"graph {JOINED}" in cuda.calls()
    assert said == [x for row in toy.oracle(TEXT[:4]) for x in row]


@pytest.mark.parametrize("lengths", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_rows_that_are_not_the_bodys_are_picked(model: Model, cuda: FakeCuda, lengths: Sequence[int]) -> None:
    """Of four tokens three want logits."""
    sequences, texts = begun(model, cuda, 3)
    news = [TEXT[9 : 9 + length] for length in lengths]
    for text, new in zip(texts, news, strict=True):
        text += new
    model.step(list(zip(sequences, news, strict=True)))
    assert [line for line in cuda.calls() if line.startswith("graph")] == [f"graph {BODY}", f"graph {HEAD}"]
    check(sequences, texts)


@pytest.mark.parametrize("how", [None, (1.5, 5, 0.5, 3)], ids=["greedy", "drawn"])
def test_running_ahead_takes_joined_steps(
    model: Model, cuda: FakeCuda, how: tuple[float, int, float, int] | None
) -> None:
    sequences, texts = begun(model, cuda, 4)
    for turn in range(4):
        cuda.calls()
        follow(model, [(s, t, how) for s, t in zip(sequences, texts, strict=True)])
        if turn and how is None:
            assert cuda.calls() == [*SENT, f"graph {JOINED}", "wait for an event"]
    check(sequences, texts)


def test_kernels_one_by_one_say_the_same(cuda: FakeCuda, joined_so: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CUDA_SYNC", "1")
    with Model(joined_so) as model:
        sequences, texts = begun(model, cuda, 4)
        for _ in range(3):
            follow(model, [(s, t, None) for s, t in zip(sequences, texts, strict=True)])
        check(sequences, texts)
        assert not [line for line in cuda.calls() if "pick_4" in line]


def test_other_batches_have_their_bodies_and_heads(model: Model, cuda: FakeCuda) -> None:
    text = model.sequence(TEXT[:5])
    cuda.calls()
    model.advance([(text, None)])
    assert f"graph {BODY + HEAD}" in cuda.calls()
    assert text.sample() == best([*TEXT[:5], best(TEXT[:5])])


def test_a_joined_step_that_says_no_token_is_refused(cuda: FakeCuda, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="plan 7, of 4 rows, chooses no tokens") as error:
        Model(written(tmp_path / "toy.so", JoinedPlan(tells=False)))
    assert error.value.status == FORMAT


def test_its_calls_are_read_from_the_file(joined_so: Path) -> None:
    with ArtifactFile.open(joined_so) as file:
        tables = file.plan()
        (joined,) = (plan for plan in tables.plans if plan.kind == KIND)
        spaces = {argument.space for call in tables.calls_of(joined) for argument in tables.arguments_of(call)}
    assert (joined.n_rows, joined.n_calls) == (4, JOINED)
    assert len(spaces) > 6

"""Steps on a GPU, through the fake driver: what a sequence says, what the driver is asked for, and what is copied."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_artifact import Host
from tests.runtime.toy_cuda import FakeCuda, ToyCudaPlan, build_code, drawn, sections
from tests.runtime.toy_model import KERNEL, Model, Refused

INPUT_BYTES = 64 + 64 + 64
"""Of a step, before the page table: tokens [16], rows [4] and positions [16], rounded up."""


@pytest.fixture
def model(cuda: FakeCuda, cuda_so: Path) -> Iterator[Model]:
    with Model(cuda_so, kv_tokens=640) as model:
        cuda.calls()
        yield model


def test_logits_agree_with_the_oracle_after_every_token(model: Model) -> None:
    sequence = model.sequence()
    for token, expected in zip(TEXT, toy.oracle(TEXT), strict=True):
        sequence.feed([token])
        assert sequence.logits() == expected


def test_a_step_is_a_copy_a_graph_and_one_wait(model: Model, cuda: FakeCuda) -> None:
    sequences = [model.sequence() for _ in range(3)]
    model.step([(sequence, [token]) for sequence, token in zip(sequences, (3, 5, 9), strict=True)])
    body, head = 1 + 3 * toy.LAYERS, 3
    page_table = 4 * 4 * toy.PAGES
    assert cuda.calls() == [f"h2d {INPUT_BYTES + page_table}", f"graph {body + head}", "wait"]


def test_the_chunks_of_a_prompt_need_no_logits_but_the_last(model: Model, cuda: FakeCuda) -> None:
    model.sequence(TEXT[:20])
    body = f"graph {1 + 3 * toy.LAYERS}"
    copies = [f"h2d {INPUT_BYTES + 4 * m * toy.PAGES}" for m in (16, 4)]
    assert cuda.calls() == [copies[0], body, "wait", copies[1], body, "graph 3", "wait"]


def test_the_body_of_a_prompt_is_launched_kernel_by_kernel(cuda: FakeCuda, tmp_path: Path) -> None:
    """The first one waits for all before it, the others may begin early; up to 64 rows there is a graph."""
    plan, path = ToyCudaPlan((2, 4, 64, 80)), tmp_path / "toy.so"
    path.write_bytes(toy.pack_sections(sections(build_code(tmp_path), plan=plan.pack())))
    with Model(path, kv_tokens=640) as model:
        sequences = [model.sequence() for _ in range(3)]
        cuda.calls()
        model.step([(sequence, TEXT[:25]) for sequence in sequences])
        _, first, *launched = cuda.calls()
        assert first == "launch embed_80 80"
        assert len(launched) == 3 * toy.LAYERS + 2
        assert all(line.startswith("launch ") and line.endswith(" dependent") for line in launched[:-2])
        assert launched[-2:] == ["graph 3", "wait"]
        assert [sequence.logits() for sequence in sequences] == 3 * [toy.oracle(TEXT[:25])[-1]]
        cuda.calls()
        model.step([(model.sequence(), TEXT[:20]) for _ in range(3)])
        assert f"graph {1 + 3 * toy.LAYERS}" in cuda.calls()


def test_the_greedy_token_is_known_without_another_copy(model: Model, cuda: FakeCuda) -> None:
    sequence = model.sequence(TEXT[:5])
    logits = toy.oracle(TEXT[:5])[-1]
    cuda.calls()
    assert sequence.sample() == logits.index(max(logits))
    assert cuda.calls() == []
    assert sequence.logits() == logits
    assert cuda.calls() == [f"d2h {4 * toy.VOCAB} unpinned", "wait"]
    assert sequence.sample() == logits.index(max(logits))
    assert sequence.logits() == logits
    assert cuda.calls() == []


def test_the_host_chooses_among_tokens_that_are_allowed(model: Model, cuda: FakeCuda) -> None:
    other, sequence = model.sequence(TEXT[:3]), model.sequence(TEXT[:5])
    best = sequence.sample()
    mask = (c.c_uint32 * 2)(~(1 << best) & 0xFFFFFFFF if best < 32 else -1, ~(1 << best - 32) if best >= 32 else -1)
    logits = toy.oracle(TEXT[:5])[-1]
    wanted = max((token for token in range(toy.VOCAB) if token != best), key=lambda token: logits[token])
    how = (0.0, 0, 1.0, 0, c.addressof(mask))
    cuda.calls()
    assert model.sample_many([(sequence, how), (other, None)]) == [wanted, other.sample()]
    assert cuda.calls() == [f"d2h {4 * toy.VOCAB} unpinned", "wait"]
    assert model.advance([(sequence, how), (other, None)])[0] == wanted
    assert sequence.logits() == toy.oracle([*TEXT[:5], wanted])[-1]
    mask[0] = mask[1] = 0
    with pytest.raises(Refused, match="no token is allowed"):
        model.sample_many([(other, (1.0, 0, 1.0, 0, c.addressof(mask)))])


def test_logits_of_all_tokens_are_given_when_asked(model: Model) -> None:
    texts = [TEXT, TEXT[4:9], TEXT[::-1], TEXT[7:8]]
    said = model.step([(model.sequence(), text) for text in texts], all_logits=True)
    assert said == [[x for row in toy.oracle(text) for x in row] for text in texts]


def test_a_batch_copies_no_logits(model: Model, cuda: FakeCuda) -> None:
    sequences = [model.sequence([token]) for token in (1, 2, 3)]
    cuda.calls()
    for _ in range(3):
        model.step([(sequence, [sequence.sample()]) for sequence in sequences])
    assert not [line for line in cuda.calls()[5:] if "unpinned" in line]


def test_logits_survive_the_steps_of_others(model: Model) -> None:
    texts = [[1, 2], [3, 4, 5], [6], [7, 8], [9], [10, 11]]
    sequences = [model.sequence(text) for text in texts]
    for sequence, text in zip(sequences, texts, strict=True):
        logits = toy.oracle(text)[-1]
        assert sequence.sample() == logits.index(max(logits))
        assert sequence.logits() == logits


def test_more_sequences_than_rows_of_a_head_keep_their_logits(model: Model) -> None:
    texts = [[i, i + 1] for i in range(11)]
    sequences = [model.sequence() for _ in texts]
    model.step(list(zip(sequences, texts, strict=True)))
    for sequence, text in zip(sequences, texts, strict=True):
        assert sequence.logits() == toy.oracle(text)[-1]


def test_a_fork_copies_one_page_on_the_device_when_it_is_written(model: Model, cuda: FakeCuda) -> None:
    sequence = model.sequence(TEXT[:6])
    fork = sequence.fork()
    cuda.calls()
    fork.feed([40])
    sequence.feed([41])
    assert cuda.calls().count(f"d2d {toy.PAGE_BYTES}") == 1
    assert fork.logits() == toy.oracle([*TEXT[:6], 40])[-1]
    assert sequence.logits() == toy.oracle([*TEXT[:6], 41])[-1]


def test_draws_reach_the_sampler_and_come_back(model: Model, cuda: FakeCuda) -> None:
    sequence = model.sequence(TEXT[:7])
    logits = toy.oracle(TEXT[:7])[-1]
    cuda.calls()
    token = sequence.sample(temperature=2, top_k=5, top_p=0.5, seed=3)
    assert token == drawn(3, 7, 2, 5, 0.5, logits.index(max(logits)))
    assert cuda.calls() == ["h2d 32", "graph 1", "d2h 4", "wait"]


def test_many_are_drawn_at_once(model: Model, cuda: FakeCuda) -> None:
    texts = [[i, i + 2] for i in range(7)]
    sequences = [model.sequence(text) for text in texts]
    best = [row.index(max(row)) for row in (toy.oracle(text)[-1] for text in texts)]
    cuda.calls()
    tokens = model.sample_many([(sequence, (1.0, 0, 1.0, i)) for i, sequence in enumerate(sequences)])
    assert tokens == [drawn(i, 2, 1, 0, 1, best[i]) for i in range(7)]
    assert [line for line in cuda.calls() if line.startswith("graph")] == ["graph 1", "graph 1"]
    mixed = model.sample_many(
        [(sequences[0], (0.0, 0, 1.0, 0)), (sequences[1], (1.0, 0, 1.0, 9)), (sequences[2], None)]
    )
    assert mixed == [best[0], drawn(9, 2, 1, 0, 1, best[1]), best[2]]


def test_nothing_is_taken_during_steps(model: Model, cuda: FakeCuda) -> None:
    sequences = [model.sequence() for _ in range(5)]
    for step in range(6):
        model.step([(sequence, [step] * (1 + i)) for i, sequence in enumerate(sequences)])
        fork = sequences[step % 5].fork()
        fork.feed([7])
        fork.sample(temperature=1)
        fork.free()
    assert not {kind for kind in cuda.kinds() if kind in ("alloc", "pin", "instantiate", "capture")}


def test_a_failing_kernel_loses_the_model_and_says_so_ever_after(cuda: FakeCuda, cuda_so: Path) -> None:
    with Model(cuda_so) as model:
        other = model.sequence([1, 2])
        sequence = model.sequence()
        with pytest.raises(Refused) as failed:
            sequence.feed([toy.POISON])
        assert failed.value.status == KERNEL
        words = "a kernel failed on Fake GPU 0: CUDA_ERROR_LAUNCH_FAILED (719: unspecified launch failure)"
        assert str(failed.value).splitlines()[0] == words
        assert "LLMC_CUDA_SYNC=1" in str(failed.value)
        assert len(sequence) == 0
        assert other.logits() == toy.oracle([1, 2])[-1]  # kept before the step that failed
        for call in (lambda: sequence.feed([1]), lambda: other.sample(temperature=1)):
            with pytest.raises(Refused, match=r"^the GPU is lost to this model: a kernel failed"):
                call()


def test_a_failing_kernel_is_named_when_each_is_waited_for(
    cuda: FakeCuda, cuda_so: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CUDA_SYNC", "1")
    with Model(cuda_so) as model:
        sequence = model.sequence([4, 5])
        assert sequence.logits() == toy.oracle([4, 5])[-1]
        with pytest.raises(Refused, match=r"^kernel 'embed_2' \(call 1 of 7\) failed on Fake GPU 0"):
            sequence.feed([toy.POISON])


def test_a_forked_child_is_refused(model: Model) -> None:
    sequence = model.sequence([1])
    child = os.fork()
    if not child:
        try:
            sequence.feed([2])
        except Refused as error:
            os._exit(0 if "forked after the model was opened" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    sequence.feed([2])
    assert sequence.logits() == toy.oracle([1, 2])[-1]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_lives_of_sequences_agree_with_the_oracle(
    cuda: FakeCuda, host: Host, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed kernel would end the model, so the fake driver's kernels take no poison here."""
    artifact = tmp_path / "toy.art"
    artifact.write_bytes(toy.pack_sections(sections()))
    monkeypatch.setenv("TOY_SOUND", "1")
    assert host("scenarios", artifact, 1, seed, 800).startswith("ok")
    assert not [line for line in cuda.calls() if line.startswith(("error", "leak"))]


def test_every_failed_allocation_of_the_host_is_an_error_and_leaks_nothing(
    cuda: FakeCuda, host: Host, tmp_path: Path
) -> None:
    artifact = tmp_path / "toy.art"
    artifact.write_bytes(toy.pack_sections(sections()))
    said = host("failures", artifact)
    assert int(said.split()[1]) > 12
    assert not [line for line in cuda.calls() if line.startswith(("error", "leak"))]

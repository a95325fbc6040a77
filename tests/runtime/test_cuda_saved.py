"""A GPU's sequences in files: their pages go over the host, and steps that run ahead are waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda
from tests.runtime.test_c_steps import TEXT
from tests.runtime.test_saved import goes_on
from tests.runtime.toy_cuda import FakeCuda
from tests.runtime.toy_model import Model, Refused


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder / "text.seq"


@pytest.fixture
def gpu(cuda: FakeCuda, cuda_so: Path) -> Iterator[Model]:
    with Model(cuda_so, kv_tokens=640) as model:
        yield model


def test_pages_go_to_the_file_and_back_to_a_gpu(gpu: Model, cuda: FakeCuda, file: Path) -> None:
    gpu.sequence(TEXT[:9]).save(file)
    cuda.calls()
    back = gpu.restore(file)
    assert [call for call in cuda.calls() if "h2d" in call] == [f"h2d {toy.PAGE_BYTES} unpinned"] * 3
    back.save(file)
    assert [call for call in cuda.calls() if "d2h" in call] == [f"d2h {toy.PAGE_BYTES} unpinned"] * 3
    goes_on(gpu.restore(file), TEXT[:9], TEXT[9:12])


def test_a_step_that_runs_ahead_is_in_the_file(gpu: Model, file: Path) -> None:
    text, sequence = TEXT[:5], gpu.sequence(TEXT[:5])
    for _ in range(3):
        text = [*text, *gpu.advance([(sequence, None)])]
    sequence.save(file)
    back = gpu.restore(file)
    goes_on(back, text, [])
    logits = toy.oracle(text)[-1]
    assert gpu.advance([(back, None), (sequence, None)]) == [logits.index(max(logits))] * 2
    how = (2.0, 3, 0.5, 7)
    again = gpu.restore(file)  # its logits go back to a row of the device
    assert gpu.sample_many([(again, how)]) == [toy_cuda.drawn(7, len(text), 2.0, 3, 0.5, logits.index(max(logits)))]


def test_a_file_of_a_cpu_is_none_of_a_gpu(gpu: Model, toy_so: Path, file: Path) -> None:
    with Model(toy_so) as model:
        model.sequence(TEXT[:9]).save(file)
    with pytest.raises(Refused, match="saved by the program for cpu, and the one that runs is for cuda:sm_90a"):
        gpu.restore(file)


def test_a_gpu_that_is_lost_says_so_and_leaves_the_file(gpu: Model, cuda: FakeCuda, file: Path) -> None:
    sequence = gpu.sequence(TEXT[:9])
    sequence.save(file)
    before = file.read_bytes()
    with pytest.raises(Refused):
        gpu.sequence([toy.POISON])
    with pytest.raises(Refused, match="the GPU is lost"):
        sequence.save(file)
    with pytest.raises(Refused, match="the GPU is lost"):
        gpu.restore(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]

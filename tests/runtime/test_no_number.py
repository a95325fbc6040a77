"""Logits that are no numbers: one error, chosen or drawn, on a CPU and on a GPU, and other sequences go on."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llmc.runtime.artifact import ArtifactFile
from tests.runtime import toy_artifact as toy
from tests.runtime import toy_cuda
from tests.runtime.toy_cuda import FakeCuda
from tests.runtime.toy_model import Model, Refused

GREEDY, DRAWN = None, (1.5, 5, 0.5, 3)
FACT = "no logit of the sequence is a number"
START = [3, 5, 9]


def text_of(n: int) -> list[int]:
    """START, and what is most likely behind it."""
    text = list(START)
    for _ in range(n):
        logits = toy.oracle(text)[-1]
        text.append(logits.index(max(logits)))
    return text


TEXT = text_of(3)
BAD = TEXT[-1]
"""A token whose embedding is not a number: nor is anything that follows it."""


def weights(value: float) -> bytes:
    section, row = bytearray(toy.weights_section()), 4 * toy.CHANNELS
    section[BAD * row : (BAD + 1) * row] = struct.pack("<f", value) * toy.CHANNELS
    return bytes(section)


@pytest.fixture(params=[(device, value) for device in ("cpu", "gpu") for value in (math.nan, math.inf)], ids=str)
def model(
    request: pytest.FixtureRequest, cuda: FakeCuda, toy_so: Path, cuda_so: Path, tmp_path: Path
) -> Iterator[Model]:
    device, value = request.param
    with ArtifactFile.open(toy_so if device == "cpu" else cuda_so) as good:
        code = good.section("code")
    pack = toy.toy_sections if device == "cpu" else toy_cuda.sections
    path = tmp_path / "bad.so"
    path.write_bytes(toy.pack_sections(pack(code, weights=weights(value))))
    with Model(path, kv_tokens=640) as model:
        yield model


def refusal(model: Model, texts: Sequence[list[int]], how: tuple[float, int, float, int] | None, call: str) -> str:
    with pytest.raises(Refused) as caught:
        getattr(model, call)([(model.sequence(text), how) for text in texts])
    return str(caught.value)


@pytest.mark.parametrize("how", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("call", ["sample_many", "advance"])
def test_nothing_is_chosen_among_no_numbers(model: Model, how: tuple[float, int, float, int] | None, call: str) -> None:
    other = model.sequence(START)
    assert BAD not in START
    for texts in ([[BAD]], [[3, BAD, 5], START], [START, START, [5, BAD]]):
        assert FACT in refusal(model, texts, how, call)
    assert all(math.isnan(logit) for logit in model.sequence([BAD]).logits())
    assert other.sample() == TEXT[len(START)]


def test_a_text_goes_on_until_there_are_none(model: Model) -> None:
    sequence = model.sequence(START)
    for token in TEXT[len(START) :]:
        assert model.advance([(sequence, GREEDY)]) == [token]
    with pytest.raises(Refused, match=FACT):
        model.advance([(sequence, GREEDY)])
    assert len(sequence) == len(TEXT)
    sequence.truncate(len(START))
    sequence.feed([8])
    assert sequence.logits() == toy.oracle([*START, 8])[-1]

"""Models of more than usual layers, from their checkpoints to tokens: the same bits in any chunks and company.

Gemma 3n keeps several streams for each token; Gemma 4 has caches of two sizes, which layers share; Kimi Linear a state
that decays by channel, and latents unturned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.runtime.binding import Model
from tests.families import save

IDS = [int(token) for token in np.random.default_rng(1).integers(3, 160, 32)]


@pytest.fixture(scope="module", params=["gemma3n_text", "gemma4_text", "kimi_linear"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp(request.param)
    options: dict[str, Any] = {"batch": (1,), "max_sequence": 32, "verify": False}  # as test_families.py compiles it
    llmc.compile(save(request.param, folder / "model"), out=folder / "model.so", **options)
    with llmc.load(folder / "model.so", kv_tokens=512, slots=6) as opened:
        yield opened


def test_chunks_of_a_prompt_change_no_bit(model: Model) -> None:
    whole = model.logits(IDS)
    with model.sequence() as sequence:
        parts = [sequence.feed_for_logits(part) for part in (IDS[:19], IDS[19:20], IDS[20:22], IDS[22:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_fork_and_a_neighbour_change_no_bit(model: Model) -> None:
    """The fork shares its first page with the sequence, and parts from it within that page."""
    with model.sequence() as one:
        one.feed(IDS[:12])
        with one.fork() as other:
            model.step([(one, IDS[12:20]), (other, IDS[20:])])
            for sequence, text in ((one, IDS[:20]), (other, IDS[:12] + IDS[20:])):
                np.testing.assert_array_equal(sequence.logits(), model.logits(text)[-1])

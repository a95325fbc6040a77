"""The bars of the parity certificate, on made-up logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from llmc.compiler.certificate import certify
from llmc.compiler.certificate.certify import Logits, Text
from llmc.runtime.errors import LlmcError

N_POSITIONS, N_VOCAB = 120, 50


def with_errors(exact: Logits, scale: float, flipped: Sequence[int] = (), seed: int = 0) -> Logits:
    """Rounding errors of a size, and at some positions those of another choice of experts."""
    errors = np.random.default_rng(seed).normal(0, scale, exact.shape)
    errors[list(flipped)] += np.random.default_rng(seed + 9).normal(0, 0.3, (len(flipped), exact.shape[1]))
    return (exact + errors).astype(np.float32)


def judged(scale: float, flipped: Sequence[int], own_flipped: Sequence[int], is_mixture: bool) -> None:
    exact = np.random.default_rng(1).normal(0, 1, (N_POSITIONS, N_VOCAB)).astype(np.float32)
    found = with_errors(exact, scale, flipped, seed=2)
    own = with_errors(exact, 0.004, own_flipped, seed=3)
    prompt = list(range(20))
    greedy = found[19:].argmax(-1).tolist()[:100]
    certificate = certify.compare([Text(prompt, greedy, found)], [exact], [own], "bf16", is_mixture)
    certify.judge(certificate, "m")


@pytest.mark.parametrize(
    ("flipped", "own_flipped"),
    [([], []), ([7], []), ([7, 90], [33]), (range(0, 120, 2), range(1, 120, 2)), (range(120), range(120))],
    ids=["none", "one of ours", "a few", "every other position", "all"],
)
def test_a_mixture_may_choose_other_experts_where_they_are_as_good(
    flipped: Sequence[int], own_flipped: Sequence[int]
) -> None:
    judged(0.004, flipped, own_flipped, is_mixture=True)


def test_another_model_may_not() -> None:
    with pytest.raises(LlmcError, match=r"logit error is \d+\.\d+ times the reference's own in bf16"):
        judged(0.004, [7], [], is_mixture=False)


@pytest.mark.parametrize(
    ("scale", "flipped"), [(0.008, []), (0.004, range(0, 120, 4))], ids=["rounding twice as bad", "a quarter is wrong"]
)
def test_a_mixture_that_is_wrong_is_refused(scale: float, flipped: Sequence[int]) -> None:
    with pytest.raises(LlmcError, match="a typical logit error is"):
        judged(scale, flipped, [], is_mixture=True)


@pytest.mark.parametrize("exact", [np.zeros((4, 9), np.float32), np.arange(4, dtype=np.float32)[:, None]])
def test_logits_that_are_all_the_same_are_refused(exact: Logits) -> None:
    """Of weights that are zeros, and of a vocabulary of one."""
    with pytest.raises(LlmcError, match="the same number for everything"):
        certify.compare([Text([0], [0, 0, 0], exact)], [exact], None, "f32")

"""The bars of the parity certificate, on made-up logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmc.compiler.certificate import bars, certify, embedding
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


def quantized(quant: str, scale: float, rounded_scale: float | None) -> dict[str, Any]:
    """The certificate of errors of a size, where rounding costs the reference errors of another size; None: nobody
    knows."""
    exact = np.random.default_rng(1).normal(0, 1, (N_POSITIONS, N_VOCAB)).astype(np.float32)
    text = Text(list(range(N_POSITIONS)), [], with_errors(exact, scale, seed=2))
    costly = None if rounded_scale is None else [with_errors(exact, rounded_scale, seed=3)]
    rounded = None if costly is None else lambda _: costly
    return certify.judged([text], lambda *_: [exact], "bf16", "m", quant, is_mixture=False, rounded=rounded)


def test_a_quantised_artifact_is_judged_by_its_distributions() -> None:
    certificate = quantized("int8", 0.1, 0.0)
    assert certificate["kl_mean"] < 0.01 == certificate["bar"]["kl_mean"]
    assert "rounded_reference" not in certificate  # it was not asked
    assert not bars.notes_of(certificate)


def test_a_model_that_takes_roundings_badly_compiles_with_a_note() -> None:
    certificate = quantized("int8", 0.2, 0.19)
    assert 0.01 < certificate["kl_mean"] < certificate["bar"]["kl_mean"] < 0.03
    (note,) = bars.notes_of(certificate)
    assert note.startswith("int8 costs this model much: its distributions diverge by 1.8e-02 nats; another --quant")


@pytest.mark.parametrize("rounded_scale", [None, 0.0, 0.15], ids=["nobody knows", "it should cost nothing", "half"])
def test_one_that_diverges_more_than_rounding_explains_does_not_match(rounded_scale: float | None) -> None:
    with pytest.raises(LlmcError, match=r"does not match its source: .* diverge by 1.8e-02 nats, the bar of int8 is 0"):
        quantized("int8", 0.2, rounded_scale)


def test_rounding_may_cost_too_much() -> None:
    with pytest.raises(LlmcError, match=r"int8 costs this model too much: .* diverge by 2.2e-01 nats") as raised:
        quantized("int8", 0.7, 0.7)
    assert "--calibrate" in str(raised.value.hint)


@pytest.mark.parametrize(("distance", "own", "notes"), [(0.0005, None, 0), (0.003, 0.0025, 1), (0.003, 0.001, None)])
def test_embeddings_are_judged_by_their_angles(distance: float, own: float | None, notes: int | None) -> None:
    """own: what rounding costs the reference.  notes: None: refused."""
    certificate: dict[str, Any] = {"dtype": "bf16", "cosine_distance": distance}
    certificate |= bars.quantised(bars.EMBEDDINGS, distance, "int8", lambda: own or 0.0)
    if notes is not None:
        embedding.judge(certificate, "m")
        assert len(bars.notes_of(certificate)) == notes
        return
    with pytest.raises(LlmcError, match=r"does not match its source: .* 3.0e-03 away .* the bar of int8 is 0.0015"):
        embedding.judge(certificate, "m")

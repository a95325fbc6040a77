"""The parity certificate of a model that gives texts labels: their logits, beside the reference's.

A text has a few numbers, where a model that writes has a vocabulary's at each token; so more texts are compared, most
of them short, each for what it is given at its end.  The bar of float32 is that of logits (certify.py), beside the
largest of them.  In bf16 the error's root mean square is at most 1.5 times that of the reference in bf16, or one
rounding of the largest logit: a largest error of so few would be chance.  Quantised weights, and a cache narrower than
the weights, are meant to differ: there it is the root mean square, as a share of the logits' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmc.compiler.certificate.certify import (
    F32_BAR,
    LOW_PRECISION_BAR,
    TOP,
    Logits,
    ReferenceLogits,
    largest_of,
    mismatch,
    prompts,
    refuse_others_than_finite,
)
from llmc.runtime import load
from llmc.runtime.binding import Model

QUANT_BARS = {"int8": 0.05, "fp8": 0.08, "int4": 0.2, "mxfp4": 0.2, "int8 KV cache": 0.05, "bf16 KV cache": 0.02}
"""Bars for the error of logits, as a share of these."""
ROUNDING = 2.0**-8
"""How much of a number rounding to bf16 may change, as a share of it."""
N_SHORT, SHORTEST, SHORT = 40, 1, 12
"""Texts, and tokens of the shortest and the longest of them."""


def certify_labels(
    artifact: Path, reference: ReferenceLogits, dtype: str, describe: dict[str, Any], quant: str | None = None
) -> dict[str, Any]:
    """Compare an artifact with its reference, which gives [1, labels] of a text.  quant: as `certify` has it.
    -> the certificate; raises LlmcError below the bar."""
    with load(artifact) as model:
        target, texts = model.target, texts_for(model)
        found = np.stack([at_end(model, text) for text in texts])
    refuse_others_than_finite(found, "labels", describe["model"])
    exact = np.concatenate(reference(texts, "f32"))
    own = None if dtype == "f32" or quant else np.concatenate(reference(texts, dtype))
    certificate = compare(texts, found, exact, own, dtype) | {"target": target, "reference": describe}
    if quant is not None:
        certificate |= {"quant": quant, "bar": {"error_share": QUANT_BARS[quant]}}
    judge(certificate, describe["model"])
    return certificate


def texts_for(model: Model) -> list[list[int]]:
    """Those of other certificates, and short ones drawn from a fixed seed: of all types of tokens that there are."""
    rng = np.random.default_rng(2026)
    longest = min(SHORT, model.info.n_context)
    lengths = rng.integers(SHORTEST, longest + 1, N_SHORT)
    short = [rng.integers(0, model.info.n_ids, n).tolist() for n in lengths]
    return [text for text in prompts(model) if text] + short


def at_end(model: Model, text: list[int]) -> Logits:
    """float32 [labels]: what the artifact gives a text."""
    with model.sequence() as sequence:
        sequence.feed(text)
        return sequence.logits().copy()


def compare(texts: Sequence[list[int]], found: Logits, exact: Logits, own: Logits | None, dtype: str) -> dict[str, Any]:
    """The numbers of the certificate; see certify.compare, whose names they have where they mean the same.  found,
    exact, own: [texts, labels]."""
    largest, extent = float(np.abs(found - exact).max()), max(float(np.abs(exact).max()), 1e-30)
    certificate: dict[str, Any] = {
        **largest_of(dtype, largest, extent),
        "error_share": size(found - exact) / max(size(exact), 1e-30),
        "n_positions": len(texts),
        "prompts": [record(text, row) for text, row in zip(texts[:-N_SHORT], exact, strict=False)],
    }
    if own is None:
        return certificate | {"bar": {"relative_error": F32_BAR}}
    return certificate | {
        "typical_error": size(found - exact),
        "reference_error": float(np.abs(own - exact).max()),
        "reference_typical_error": size(own - exact),
        "bar": {"times_reference_typical_error": LOW_PRECISION_BAR},
    }


def size(x: Logits) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.square(x.astype(np.float64)).mean()))


def record(text: list[int], exact: Logits) -> dict[str, Any]:
    """One text's part: what `llmc verify` replays without the reference."""
    top = np.argsort(-exact)[:TOP]
    return {"tokens": text, "greedy": [], "top_logits": {"ids": top.tolist(), "values": [float(exact[i]) for i in top]}}


def judge(certificate: dict[str, Any], model: str) -> None:
    """Refuse an artifact of `model` below the bar."""
    if quant := certificate.get("quant"):
        share = certificate["error_share"]
        failed = not share <= QUANT_BARS[quant]
        said = f"the error of its labels is {share:.1e} of their logits, the bar of {quant} is {QUANT_BARS[quant]}"
    elif certificate["dtype"] == "f32":
        failed = not certificate["relative_error"] <= F32_BAR
        said = f"the error is {certificate['relative_error']:.1e} of the largest logit, the bar is {F32_BAR:.0e}"
    else:
        typical, own = certificate["typical_error"], certificate["reference_typical_error"]
        failed = not typical <= max(LOW_PRECISION_BAR * own, ROUNDING * certificate["logit_range"])
        said = f"a typical error is {typical / max(own, 1e-30):.2f} times the reference's own in {certificate['dtype']}"
        said += f", the bar is {LOW_PRECISION_BAR}"
    if failed:
        raise mismatch(said, model)

"""The parity certificate of a model for embeddings: what its embeddings are made of, beside the reference's.

At every position of a few texts the artifact's last norm is compared with transformers' own, in float32.  The bars of
float32 and bf16 are those of logits (certify.py): the largest error, as a share of the range or beside the reference's
own in bf16.  Quantised weights, and a cache narrower than the weights, are meant to differ: there it is the mean over
positions of the cosine's distance from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.certificate import bars
from llmc.compiler.certificate.certify import (
    F32_BAR,
    LOW_PRECISION_BAR,
    TOP,
    Logits,
    ReferenceLogits,
    Rounded,
    largest_of,
    mismatch,
    prompts,
    refuse_others_than_finite,
)
from llmc.runtime import load


def certify_embedding(
    artifact: Path,
    reference: ReferenceLogits,
    size: int,
    dtype: str,
    describe: dict[str, Any],
    quant: str | None = None,
    rounded: Rounded | None = None,
) -> dict[str, Any]:
    """Compare an artifact with its reference.  size: elements of an embedding.  quant, rounded: as `certify` has
    them.
    -> the certificate; raises LlmcError below the bar."""
    with load(artifact) as model:
        target = model.target
        texts = [prompt for prompt in prompts(model) if prompt]
        found = [model.logits(text)[:, :size] for text in texts]
    refuse_others_than_finite(found, "embeddings", describe["model"])
    exact = reference(texts, "f32")
    own = None if dtype == "f32" or quant else reference(texts, dtype)
    certificate = compare(texts, found, exact, own, dtype) | {"target": target, "reference": describe}
    if quant is not None:
        cost = None if rounded is None else lambda: float(distances(rounded(texts, target), exact).mean())
        certificate |= bars.quantised(bars.EMBEDDINGS, certificate["cosine_distance"], quant, cost)
    judge(certificate, describe["model"])
    return certificate


def compare(
    texts: Sequence[list[int]],
    found: Sequence[Logits],
    exact: Sequence[Logits],
    own: Sequence[Logits] | None,
    dtype: str,
) -> dict[str, Any]:
    """The numbers of the certificate; see certify.compare, whose names they have where they mean the same."""
    largest, extent = largest_error(found, exact), max(float(np.ptp(rows)) for rows in exact)
    from_exact = distances(found, exact)
    certificate: dict[str, Any] = {
        **largest_of(dtype, largest, extent),
        "cosine_distance": float(from_exact.mean()),
        "least_cosine": float(1 - from_exact.max()),
        "n_positions": int(from_exact.size),
        "prompts": [record(text, rows) for text, rows in zip(texts, exact, strict=True)],
    }
    if own is None:
        return certificate | {"bar": {"relative_error": F32_BAR}}
    return certificate | {
        "reference_error": largest_error(own, exact),
        "bar": {"times_reference_error": LOW_PRECISION_BAR},
    }


def largest_error(found: Sequence[Logits], exact: Sequence[Logits]) -> float:
    return max(float(np.abs(f - e).max()) for f, e in zip(found, exact, strict=True))


def distances(found: Sequence[Logits], exact: Sequence[Logits]) -> NDArray[np.float64]:
    """1 - cosine at each position of all texts, one behind the other."""
    return np.concatenate([1 - cosine(f, e) for f, e in zip(found, exact, strict=True)])


def cosine(a: Logits, b: Logits) -> NDArray[np.float64]:
    """The cosines of the angles between rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((x * y).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1), 1e-30))


def record(text: list[int], exact: Logits) -> dict[str, Any]:
    """One text's part: what `llmc verify` replays without the reference, the largest elements at the last token."""
    top = np.argsort(-exact[-1])[:TOP]
    values = [float(value) for value in exact[-1][top]]
    return {"tokens": text, "greedy": [], "top_logits": {"ids": top.tolist(), "values": values}}


def judge(certificate: dict[str, Any], model: str) -> None:
    """Refuse an artifact of `model` below the bar."""
    if certificate.get("quant"):
        said = bars.beyond(bars.EMBEDDINGS, certificate, model) or ""
        failed = bool(said)
    elif certificate["dtype"] == "f32":
        failed = not certificate["relative_error"] <= F32_BAR
        said = f"the error is {certificate['relative_error']:.1e} of the range, the bar is {F32_BAR:.0e}"
    else:
        ratio = certificate["max_logit_error"] / max(certificate["reference_error"], 1e-30)
        failed = not ratio <= LOW_PRECISION_BAR
        own = f"the reference's own in {certificate['dtype']}"
        said = f"the error is {ratio:.2f} times {own}, the bar is {LOW_PRECISION_BAR}"
    if failed:
        raise mismatch(said, model)

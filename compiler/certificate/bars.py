"""How far a quantised artifact may be from its source.

What is usual is let through.  Beyond that either the model takes roundings badly, as small trained ones do, or the
artifact computes something else: so the reference's own products are rounded as the kernels round theirs
(reference_rounding.py), and the artifact may lose at most 1.5 times as much as that, and no more than is of any use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.runtime.errors import LlmcError

ROUNDED_BAR = 1.5
"""Times what the reference loses when its products are rounded."""
ROUNDED = "rounded_reference"
"""What that is called in certificates, which have it where it was asked for."""


@dataclass(frozen=True)
class Bars:
    """usual: by what is quantised, what may be lost without further ado.  most: what may be lost if the reference does
    too; of what has none the usual is all.  said: what is lost, in words."""

    measure: str
    usual: Mapping[str, float]
    most: Mapping[str, float]
    said: str


LOGITS = Bars(
    "kl_mean",
    {"int8": 0.01, "fp8": 0.03, "int4": 0.1, "mxfp4": 0.1, "int8 KV cache": 0.01, "bf16 KV cache": 0.001},
    {"int8": 0.1, "fp8": 0.3, "int4": 1.0},
    "its distributions diverge by {:.1e} nats",
)
EMBEDDINGS = Bars(
    "cosine_distance",
    {"int8": 0.001, "fp8": 0.003, "int4": 0.02, "mxfp4": 0.02, "int8 KV cache": 0.001, "bf16 KV cache": 1e-4},
    {"int8": 0.01, "fp8": 0.03, "int4": 0.2},
    "its embeddings are {:.1e} away from the reference's (1 - cosine)",
)


def quantised(bars: Bars, lost: float, quant: str, cost: Callable[[], float] | None) -> dict[str, Any]:
    """What a certificate says of its bar.  lost: by the artifact.  cost: works out what the reference loses when its
    products are rounded so; None: nobody can."""
    said: dict[str, Any] = {"quant": quant, "bar": {bars.measure: bars.usual[quant]}}
    if cost is None or quant not in bars.most or not lost > bars.usual[quant]:
        return said
    own = cost()
    bar = min(max(ROUNDED_BAR * own, bars.usual[quant]), bars.most[quant])
    return said | {ROUNDED: own, "bar": {bars.measure: bar}}


def beyond(bars: Bars, certificate: Mapping[str, Any], model: str) -> str | None:
    """What is said of a quantised artifact of `model` that is not within its bar; None: it is.  Raises LlmcError where
    rounding alone costs too much."""
    quant, lost, bar = certificate["quant"], certificate[bars.measure], certificate["bar"][bars.measure]
    if lost <= bar:
        return None
    said = f"{bars.said.format(lost)}, the bar of {quant} is {bar:.2g}"
    if bar == bars.most.get(quant):
        hint = f"{what_loses_less(quant)}; --verify off compiles it"
        raise LlmcError(f"{quant} costs this model too much: {said}", place=model, hint=hint)
    return said


def notes_of(certificate: Mapping[str, Any]) -> list[str]:
    """What the user should be told: that rounding costs this model much."""
    if ROUNDED not in certificate:
        return []
    bars = LOGITS if LOGITS.measure in certificate else EMBEDDINGS
    said = bars.said.format(certificate[bars.measure])
    return [f"{certificate['quant']} costs this model much: {said}; {what_loses_less(certificate['quant'])}"]


def what_loses_less(quant: str) -> str:
    """A hint for who compiles with `quant`."""
    options = "--calibrate and --quant-bits where they were" if quant == "int4" else "--calibrate where it was"
    return f"another --quant loses less, or {options} not given"

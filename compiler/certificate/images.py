"""The certificate of an artifact that takes pictures: the rows that it makes of one, and what it says about them.

One tile, or one picture where they are of any size, made of numbers that are the same everywhere (runtime/given.py),
goes through the artifact's tower and through transformers'. In float32 the largest error of the rows is at most 2e-4 of
their range, in bf16 the root of their mean square error at most 1.5 times that of transformers in bf16. Weights of
towers are not quantised, and so neither is the bar.
Then texts with the tile in them are continued and judged as texts without (certify.py), where the reference reads its
own rows, not the artifact's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmc.compiler.certificate.certify import (
    F32_BAR,
    LOW_PRECISION_BAR,
    Logits,
    continue_greedily,
    judged,
    mismatch,
)
from llmc.compiler.certificate.labels import size
from llmc.compiler.certificate.reference import reference_logits
from llmc.compiler.certificate.reference_images import reference_rows
from llmc.runtime import load
from llmc.runtime.given import EXAMPLE_ROWS, Example

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel
    from llmc.compiler.quantization.quantize import Scheme

AROUND = ((0, 5), (4, 3))
"""How many tokens stand before the tile, and behind it."""
Floats = NDArray[np.float32]


def certify_images(
    artifact: Path,
    source: SourceModel,
    describe: dict[str, Any],
    quant: str | None,
    is_mixture: bool,
    scheme: Scheme | None = None,
) -> dict[str, Any]:
    """Compare what an artifact makes of a picture with what transformers does.  -> the certificate; raises LlmcError
    below the bar.

    The arguments are those of `certify.certify` and `certify.certify_source`.
    """
    said = f"{describe['model']}, with a picture"
    with load(artifact) as model, (example := Example.of(model.info)).seen(model) as given:
        found, target, lines_and_columns = given.numbers(), model.target, example.grid and EXAMPLE_ROWS
        prompts = texts_around(given.ids, model.info.n_ids)
        fitting = [prompt for prompt in prompts if len(prompt) < model.info.n_context]
        texts = [continue_greedily(model, prompt, said) for prompt in fitting]

    @cache
    def rows(dtype: str) -> Floats:
        return reference_rows(source, example, dtype)

    def reference(tokens: list[list[int]], dtype: str) -> list[Logits]:
        return reference_logits(source, tokens, dtype, given=(given.ids.start, rows(dtype)), grid=lines_and_columns)

    def rounded(tokens: list[list[int]]) -> list[Logits]:
        first, on_cpu = given.ids.start, target.startswith("cpu")
        seen = first, rows("f32")
        return reference_logits(source, tokens, given=seen, grid=lines_and_columns, rounding=scheme, inputs=on_cpu)

    compared = compare_rows(found, rows("f32"), None if source.dtype == "f32" else rows(source.dtype))
    judge_rows(compared, said)
    certificate = {"status": "passed", "prompts": []}  # where a tile is as long as a text may be
    if texts:
        certificate = judged(texts, reference, source.dtype, said, quant, is_mixture, rounded if scheme else None)
    return certificate | {"rows": compared, "target": target, "first_row": given.ids.start}


def texts_around(rows: range, n_ids: int) -> list[list[int]]:
    """Token sequences, drawn from a fixed seed, that have these rows in them."""
    rng = np.random.default_rng(2026)
    drawn = [[rng.integers(0, n_ids, n).tolist() for n in around] for around in AROUND]
    return [[*before, *rows, *behind] for before, behind in drawn]


def compare_rows(found: Floats, exact: Floats, own: Floats | None) -> dict[str, Any]:
    """The numbers of the rows' part.  exact: transformers' in float32; own: in the artifact's dtype."""
    error, extent = float(np.abs(found - exact).max()), float(np.ptp(exact))
    compared: dict[str, Any] = {"max_error": error, "range": extent, "relative_error": error / max(extent, 1e-30)}
    if own is None:
        return compared | {"bar": {"relative_error": F32_BAR}}
    return compared | {
        "typical_error": size(found - exact),
        "reference_typical_error": size(own - exact),
        "bar": {"times_reference_typical_error": LOW_PRECISION_BAR},
    }


def judge_rows(compared: dict[str, Any], model: str) -> None:
    """Refuse rows below the bar."""
    if "typical_error" in compared:
        ratio = compared["typical_error"] / max(compared["reference_typical_error"], 1e-30)
        failed = not ratio <= LOW_PRECISION_BAR  # so that NaN is none
        said = f"{ratio:.2f} times the reference's own, the bar is {LOW_PRECISION_BAR}"
    else:
        failed = not compared["relative_error"] <= F32_BAR
        said = f"{compared['relative_error']:.1e} of the range, the bar is {F32_BAR:.0e}"
    if failed:
        raise mismatch(f"the error of a picture's rows is {said}", model)

"""What quantising costs: held-out perplexity of the demonstration model's artifacts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmc
from llmc.compiler.certificate.certify import kl
from llmc.runtime.artifact import ArtifactFile

STORIES = Path(__file__).parents[1] / "examples" / "stories"
N_STORIES = 80
N_TOKENS = 120
"""Each story is read up to here, 9500 tokens in all: less than a large prefill chunk, whose kernels need not be
compiled then."""


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    from transformers import AutoTokenizer

    sys.path.insert(0, str(STORIES))
    from evaluate import held_out_sequences

    found = held_out_sequences(AutoTokenizer.from_pretrained(STORIES / "model"), N_STORIES)
    return [sequence[:N_TOKENS] for sequence in found]


@pytest.fixture(scope="module")
def exact(sequences: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Perplexity of the bf16 artifact."""
    path = tmp_path_factory.mktemp("exact") / "bf16.so"
    compile_stories(path, verify=False)
    return perplexity(path, sequences)


def compile_stories(path: Path, **options: Any) -> dict[str, Any]:
    return llmc.compile(STORIES / "model", out=path, batch=(1,), max_sequence=N_TOKENS, **options)


def perplexity(path: Path, sequences: Iterable[list[int]]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each sequence."""
    losses = []
    with llmc.load(path) as model:
        for tokens in sequences:
            logits = model.logits(tokens[:-1]).astype(np.float64)
            chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
            losses.append(np.logaddexp.reduce(logits, axis=-1) - chosen)
    return math.exp(np.concatenate(losses).mean())


@pytest.mark.parametrize(
    ("options", "bar", "per_weight"),
    [
        ({"quant": "int8"}, 0.001, 1.05),
        ({"quant": "fp8"}, 0.005, 1.05),
        ({"quant": "int4"}, 0.02, 0.6),
        ({"quant": "int4", "quant_group": 128, "quant_lm_head": True}, 0.02, 0.6),
    ],
    ids=["int8", "fp8", "int4", "int4 in groups of 128, lm_head too"],
)
def test_held_out_perplexity_stays(
    exact: float, sequences: list[list[int]], tmp_path: Path, options: dict[str, Any], bar: float, per_weight: float
) -> None:
    report = compile_stories(tmp_path / "m.so", **options)
    assert perplexity(tmp_path / "m.so", sequences) / exact - 1 < bar
    assert report["certificate"]["status"] == "passed"
    assert report["quant"]["name"] == options["quant"]
    with ArtifactFile.open(tmp_path / "m.so") as file:
        weights = file.manifest()["weights"]
    n_mlp = 2 * 640 * 256
    (mlp,) = [w["bytes"] for w in weights if w["name"].startswith("model.layers.0.mlp.{gate,up}_proj")]
    assert mlp < per_weight * n_mlp


def test_calibration_brings_the_distributions_nearer_on_stories_it_has_not_seen(
    sequences: list[list[int]], tmp_path: Path
) -> None:
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(training_stories(30)), encoding="utf-8")
    options = {"quant": "int4", "quant_group": 128, "verify": False}
    compile_stories(tmp_path / "exact.so", verify=False)
    compile_stories(tmp_path / "rounded.so", **options)
    compile_stories(tmp_path / "fitted.so", **options, calibrate=text)
    exact, rounded, fitted = (logits(tmp_path / f"{name}.so", sequences) for name in ("exact", "rounded", "fitted"))
    assert divergence(exact, fitted) < 0.8 * divergence(exact, rounded)


def training_stories(n: int) -> list[str]:
    from grammar import stories

    return [story.text for story in islice(stories(held_out=False), n)]


def logits(path: Path, sequences: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    with llmc.load(path) as model:
        return [model.logits(tokens) for tokens in sequences]


def divergence(exact: list[np.ndarray[Any, Any]], found: list[np.ndarray[Any, Any]]) -> float:
    return float(np.concatenate([kl(a, b) for a, b in zip(exact, found, strict=True)]).mean())

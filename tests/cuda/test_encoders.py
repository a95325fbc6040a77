"""Encoders on the emulated GPU make the CPU's embeddings: of texts alone and together, short and long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import llmc
from llmc.cli.main import main
from llmc.runtime import LlmcError
from tests import test_labels
from tests.cuda.conftest import EmulatedGpu
from tests.test_encoders import TEXTS, dense, few_bodies, save, with_modules


@pytest.fixture(autouse=True)
def _few_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    few_bodies(monkeypatch)


class Both:
    """One checkpoint for a CPU and for the emulated GPU."""

    def __init__(self, folder: Path, gpu: EmulatedGpu, to: Path, **options: Any) -> None:
        self.cpu, self.gpu = to / "cpu.so", to / "gpu.so"
        options = {"dtype": "bf16", "batch": (2,), **options}
        llmc.compile(folder, out=self.cpu, verify=False, **options)
        gpu.compile(folder, self.gpu, **options)
        inspected = CliRunner().invoke(main, ["inspect", str(self.gpu), "--schedules"])
        assert (inspected.exit_code, "fallback" in inspected.output) == (0, False), inspected.output


def refuse_others(found: Any, wanted: Any) -> None:
    """Vectors must point where they should, as bf16 rounds."""
    cosines = np.einsum("ij,ij->i", found, wanted) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert (cosines > 0.999).all(), cosines


@pytest.mark.parametrize(
    ("family", "quant"), [("bert", "int4"), ("modernbert", "none"), ("gemma", "int8"), ("mpnet", "fp8")]
)
def test_embeddings_are_the_cpus(family: str, quant: str, emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    both = Both(save(family, tmp_path / "m"), emulated_gpu, tmp_path, quant=quant)
    with llmc.load(both.cpu) as model:
        wanted = model.embed(TEXTS)
    with llmc.load(both.gpu) as model:
        assert model.info.device != "CPU"
        found = model.embed(TEXTS)
        refuse_others(found, wanted)
        np.testing.assert_array_equal(model.embed(TEXTS[4:])[0], found[4])
    assert emulated_gpu.complaints() == []


def test_every_head_of_a_step_knows_where_texts_begin(
    emulated_gpu: EmulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first token, through a product: the first head runs in one graph with its body, others by themselves."""
    few_bodies(monkeypatch, 16)
    folder = with_modules(save("bert", tmp_path / "bert"), tmp_path / "m", {"pooling_mode_cls_token": True}, "Dense")
    dense(folder / "2_Dense", 64, 200, True, "activation.Tanh")
    both = Both(folder, emulated_gpu, tmp_path)
    rows = []
    for path in (both.cpu, both.gpu):
        with llmc.load(path) as model, model.sequence() as sequence, model.sequence() as other:
            assert (model.info.n_vocab, model.is_whole) == (200, True)
            rows.append([sequence.feed_for_logits(TEXTS[0]), other.feed_for_logits(TEXTS[4])])
            other.truncate(0)
            other.feed(TEXTS[0])
            np.testing.assert_array_equal(other.logits(), sequence.logits())
            with pytest.raises(LlmcError, match="chooses no tokens"):
                other.sample()
            with pytest.raises(LlmcError, match="reads a text whole"):
                other.feed([1])
    for wanted, found in zip(*rows, strict=True):
        refuse_others(found, wanted)
    assert emulated_gpu.complaints() == []


@pytest.mark.parametrize(("family", "n_labels", "pairs"), [("bert", 3, [[5, 17, 160 + 3, 160 + 40]]), ("qwen3", 1, [])])
def test_labels_are_the_cpus(
    family: str, n_labels: int, pairs: list[list[int]], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    """Of a first token, and of pairs, whose tokens' numbers say which text they are of; of a decoder's last token."""
    both = Both(test_labels.save(family, tmp_path / "m", n_labels), emulated_gpu, tmp_path)
    texts = [*TEXTS, *pairs]
    with llmc.load(both.cpu) as model:
        wanted = model.classify(texts, raw=True)
    with llmc.load(both.gpu) as model:
        np.testing.assert_allclose(model.classify(texts, raw=True), wanted, atol=0.02 * np.abs(wanted).max())
    assert emulated_gpu.complaints() == []

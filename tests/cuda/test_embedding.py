"""Embeddings on the emulated GPU are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from tests.cuda.conftest import EmulatedGpu

TEXTS = [[5, 17, 3], [7], list(range(20, 60))]


def test_embeddings_are_the_cpus(checkpoint: Callable[[str], Path], emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": "bf16", "batch": (1,), "task": "embed", "max_sequence": 64}
    llmc.compile(checkpoint("llama"), out=tmp_path / "cpu.so", verify=False, **options)
    emulated_gpu.compile(checkpoint("llama"), tmp_path / "gpu.so", **options)
    with llmc.load(tmp_path / "cpu.so") as model:
        wanted = model.embed(TEXTS)
    with llmc.load(tmp_path / "gpu.so") as model:
        assert model.info.device != "CPU"
        found = model.embed(TEXTS)
    assert (np.einsum("ij,ij->i", found, wanted) > 0.999).all()
    assert emulated_gpu.complaints() == []

"""The stage of experts, on the driver that stands in for a GPU's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmc.bench.gpu import mxfp4, prepare
from llmc.bench.gpu.experts import STAGE, refuse_wrong, report
from llmc.bench.gpu.jobs import Jobs, experts_layer
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import write_cubins
from llmc.compiler.quantization.quantize import Scheme, quantize
from llmc.schedules.cuda.quant_strips import Mxfp4Strips
from tests.bench.fake_gpu import CUBIN, TARGET, TINY, misuse, run
from tests.emulator.build import build_library
from tests.runtime.toy_cuda import build_driver


def test_a_layer_is_checked_and_timed(tmp_path: Path) -> None:
    """Against what its weights on the device say.  (PyTorch sees no GPU here.)"""
    jobs = Jobs(TARGET, {}, {})
    clamp = {"alpha": 1.7, "limit": 1.0, "offset": 1.0}
    layers = [experts_layer(jobs, "tiny", (3, 2, 4, 40, 72)), experts_layer(jobs, "clamped", (2, 2, 3, 40, 72), clamp)]
    assert len(layers[0]["candidates"]) == 4
    for layer in layers:
        layer["candidates"] = layer["candidates"][:1]
    needed = {launch["kernel"] for layer in layers for launch in layer["candidates"][0]["launches"]}
    kernels = {name: kernel for name, kernel in jobs.kernels.items() if name in needed}
    said = {"target": str(TARGET), "settings": TINY, "experts": layers}
    said |= {name: [] for name in ("jobs", "models", "chains", "switched")}
    said["kernels"] = {name: prepare.kernel_to_json(kernel) for name, kernel in kernels.items()}
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "kit.json").write_text(json.dumps(said))
    write_cubins(tmp_path / "kit", dict.fromkeys(kernels, CUBIN))
    prepare.write_programs(tmp_path / "kit")
    (tmp_path / "kernels.so").symlink_to(build_library(list(kernels.values()), TARGET))
    build_driver(tmp_path)
    journal = run(tmp_path, tmp_path / "out", "--stages", "k")
    for name in ("tiny M=3", "clamped M=2"):
        found = journal.results(STAGE)[name]
        assert found["us"] > 0
        assert found["checked"]
        assert (found["torch"], found["torch_errors"]) == ({}, {})
    assert next(report(journal)).startswith("- experts of tiny M=3: ")
    assert misuse(tmp_path / "fake.log") == []


@pytest.mark.parametrize(("shape", "gated"), [((80, 136), True), ((70, 200), False)])
def test_weights_in_mxfp4_are_read_as_they_were(shape: tuple[int, int], gated: bool) -> None:
    """Exactly, whatever the powers of two."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape) * np.exp2(generator.integers(-100, 100, (shape[0], 1)))
    stored = quantize(weight.astype(np.float32), Scheme(4, 32, number="mx"))
    packed = Mxfp4Strips(32, gated).pack(stored)
    np.testing.assert_array_equal(mxfp4.unpack(packed, shape, gated=gated), stored.values())


@pytest.mark.parametrize("wrong", [1.9, float("nan")])
def test_a_result_that_differs_ends_it(wrong: float) -> None:
    expected = np.array([1.0, 2.0], np.float32)
    refuse_wrong(expected + np.float32(0.01), expected, "GEMV")
    with pytest.raises(ValueError, match="GEMV: wrong by"):
        refuse_wrong(np.array([1.0, wrong], np.float32), expected, "GEMV")


def test_a_report_tells_what_nobody_checked_and_what_failed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    best = {"us": 5.0, "gb_per_s": 2.0, "candidates": [{"words": "GEMV", "us": 5.0}]}
    errors = {"grouped": "RuntimeError: no such card"}
    journal.append(STAGE, "a", "done", **best, checked=True, torch={"loop": 9.0}, torch_errors=errors)
    journal.append(STAGE, "b", "done", **best, checked=False, torch={}, torch_errors={})
    assert list(report(journal)) == [
        "- experts of a: 5.0 µs, 2 GB/s, GEMV; PyTorch: loop 9 µs, grouped failed (RuntimeError: no such card)",
        "- experts of b: 5.0 µs, 2 GB/s, GEMV, unchecked; PyTorch: not there",
    ]

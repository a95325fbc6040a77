"""A kit's models: carried without their weights, filled there, run beside Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.bench.gpu import carry, plan, prepare, work
from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.journal import Journal
from llmc.bench.gpu.kit import Kit
from llmc.bench.gpu.prepare import Wanted
from llmc.compiler import artifact
from llmc.runtime import ArtifactFile
from tests.bench.fake_gpu import LLAMA, OPT, TARGET, Made, misuse, outcomes, run


def test_an_artifact_is_filled_with_the_weights_that_compiling_gives_it(
    model: Wanted, model_kit: Path, tmp_path: Path
) -> None:
    carried = Model(model_kit / "kit" / "models" / "tiny")
    carried.write(tmp_path / "tiny.so")
    program = prepare.plan_model(model, TARGET).program
    weights = b"".join(artifact.packed_weights(program.weights, lambda done, total: None))
    with ArtifactFile.open(tmp_path / "tiny.so") as file:
        place = file.sections["weights"]
        assert file.plan().header.n_vocab == LLAMA["vocab_size"]
    data = (tmp_path / "tiny.so").read_bytes()
    assert data[place.offset : place.offset + len(weights)] == weights


def test_a_system_that_failed_twice_is_not_tried_further(model_kit: Path, tmp_path: Path) -> None:
    kit, journal = Kit(model_kit / "kit"), Journal(tmp_path / "results.jsonl")
    (part,) = plan.named("models in short")
    load, logits, *rest = work.waiting(part, kit, journal)
    assert [load, logits, rest[2]] == ["tiny llmc load", "tiny llmc logits", "tiny llmc decode 1x40"]
    for item in (load, logits):
        assert rest[2] in work.waiting(part, kit, journal)
        journal.append("whole", item, "failed", error="")
    assert work.waiting(part, kit, journal) == [item for item in rest if " llmc " not in item]


def test_what_is_folded_into_a_product_behind_layer_norm_is_filled_too(tmp_path: Path) -> None:
    """Decode of 64 has a norm's vectors multiplied by the weight of the product behind it."""
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "config.json").write_text(json.dumps(OPT))
    wanted = Wanted(str(tmp_path / "opt"), max_sequence=None, batch=(1, 64))
    with pytest.MonkeyPatch.context() as patch:
        Made(patch)
        carry.write_model(tmp_path / "kit", prepare.plan_model(wanted, TARGET), TARGET)
    carried = Model(tmp_path / "kit")
    folded = [weight for weight in carried.said["weights"] if weight["recipe"]["kind"] == "folded"]
    assert len(folded) == 4  # of two layers, but for the first norm, and of a joined step's head
    carried.write(tmp_path / "opt.so")
    program = prepare.plan_model(wanted, TARGET).program
    weights = b"".join(artifact.packed_weights(program.weights, lambda done, total: None))
    with ArtifactFile.open(tmp_path / "opt.so") as file:
        place = file.sections["weights"]
    data = (tmp_path / "opt.so").read_bytes()
    assert data[place.offset : place.offset + len(weights)] == weights


def test_a_whole_model_runs_beside_hugging_face(model_kit: Path, tmp_path: Path) -> None:
    journal = run(model_kit, tmp_path / "out", "--stages", "ag", LLMC_GPU_WORK=str(tmp_path))
    assert set(outcomes(journal, "whole").values()) == {"done"}
    found = journal.results("whole")["tiny hf logits"]
    assert (found["agree"], found["of"]) == (32, 32)
    assert found["ratio"] < 1.5  # of Hugging Face's own error in bfloat16
    assert journal.results("whole")["tiny llmc timeline 1x40"]["kernels"] == []  # no GPU, no trace
    assert "| tiny | 1x40 |" in (tmp_path / "out" / "summary.md").read_text()
    assert misuse(tmp_path / "fake.log") == []

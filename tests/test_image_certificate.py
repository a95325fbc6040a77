"""The certificate of a model that takes pictures: made, replayed, and refused to one with another tower."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmc.cli.main import main
from llmc.compiler.certificate.certify import certify_source
from llmc.compiler.driver import compile_model
from llmc.compiler.frontend.source import load_source
from llmc.runtime import ArtifactFile
from llmc.runtime.errors import LlmcError
from tests.towers import config_of, save_model


def test_a_picture_is_certified_and_replayed(tmp_path: Path) -> None:
    save_model(config_of("llava"), tmp_path / "whole", torch.bfloat16)
    compile_model(tmp_path / "whole", out=tmp_path / "m.so", images=True, batch=(1,), max_sequence=64)
    with ArtifactFile.open(tmp_path / "m.so") as file:
        certificate = file.manifest()["certificate"]["images"]
    rows = certificate["rows"]
    assert 0 < rows["typical_error"] <= 1.5 * rows["reference_typical_error"]
    assert certificate["kl_mean"] < 1e-3
    n_rows = [sum(token >= certificate["first_row"] for token in prompt["tokens"]) for prompt in certificate["prompts"]]
    assert n_rows == [16, 16]
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.so")]).output
    assert re.search(r"images  .*16 tokens; passed: logits within .* nats, rows within \S+ of their range", shown)
    asked = ["verify", str(tmp_path / "m.so"), "--against", str(tmp_path / "whole"), "--json"]
    said = CliRunner().invoke(main, asked)
    checks = {check["name"]: check["status"] for check in json.loads(said.output)["checks"]}
    assert checks["prompt 2 with a picture"] == "passed"
    assert set(checks.values()) == {"passed"}


def test_another_tower_is_found_out(tmp_path: Path) -> None:
    model = save_model(config_of("llava"), tmp_path / "whole")
    how = {"images": True, "batch": (1,), "max_sequence": 17, "verify": False}
    compile_model(tmp_path / "whole", out=tmp_path / "m.so", **how)  # type: ignore[arg-type]
    model.get_parameter("model.multi_modal_projector.linear_2.bias").data[0] += 1
    model.save_pretrained(tmp_path / "other")
    source = load_source(str(tmp_path / "other"), max_sequence=17, images=True)
    with pytest.raises(LlmcError, match=r"the error of a picture's rows is .* of the range, the bar is"):
        certify_source(tmp_path / "m.so", source)

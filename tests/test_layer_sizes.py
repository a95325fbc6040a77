"""A model whose layers differ, from its checkpoint to what is said of it: caches of two sizes, layers that share them.

Its bits in any company are test_company.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import llmc
from llmc.bench.contexts import context_bytes
from llmc.cli.main import main
from llmc.runtime import ArtifactFile
from tests.families import save


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4")
    options: dict[str, Any] = {"batch": (1,), "max_sequence": 32, "verify": False}  # as test_families.py compiles it
    llmc.compile(save("gemma4_text", folder / "model"), out=folder / "model.so", **options)
    return folder / "model.so"


def test_each_layer_counts_by_its_own_size(artifact: Path) -> None:
    """Four bytes a number.  Layers see 24 tokens, or all."""
    with ArtifactFile.open(artifact) as file:
        cache, n_layers = file.manifest()["kv_cache"], file.manifest()["model"]["n_layers"]
    local, whole = 2 * 2 * 16 * 4, 2 * 48 * 4
    assert (cache["bytes_per_token"], n_layers) == (local + whole, 4)
    assert cache["layer_bytes"] == [64 * local, 64 * whole]
    for length, seen in ((10, 10), (30, 24)):
        assert context_bytes(cache, length) == 2 * (seen * local + length * whole)
    said = CliRunner().invoke(main, ["inspect", str(artifact)]).output
    assert "a token in f32 (1 layer of 256 B, 1 layer of 384 B, 2 that share them)" in said
    plan = CliRunner().invoke(main, ["inspect", "--plan", str(artifact)]).output
    assert {f"layers.{i}.kv_cache" for i in range(3) if f"layers.{i}.kv_cache" in plan} == {
        "layers.0.kv_cache",
        "layers.1.kv_cache",
    }

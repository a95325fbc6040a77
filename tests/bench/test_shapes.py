"""Models that are compared in GGUF: llmc reads every one of them, whole; weights are what they should be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmc.bench.compare import config_of as told
from llmc.bench.peers import environments
from llmc.bench.peers.environments import Entry
from llmc.bench.peers.process import PeerError
from llmc.bench.peers.random_gguf import header, n_bytes, padded, type_of, write_gguf
from llmc.bench.peers.shapes import SHAPES, Shape, attention, mlp, norms, shape
from llmc.compiler.frontend.config import parse_config
from llmc.compiler.frontend.gguf.file import open_gguf
from llmc.compiler.frontend.gguf.model import checkpoint_of, config_of
from llmc.compiler.frontend.packed.ggml import numbers

LAYERS = {"olmoe-1b-7b.gguf": 8, "qwen3-30b-a3b.gguf": 6, "gpt-oss-20b.gguf": 3, "lfm2-1.2b.gguf": 16}


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_read_as_its_file_says(name: str, tmp_path: Path) -> None:
    model, kind = SHAPES[name](), "mxfp4" if name.startswith("gpt-oss") else "q4_0"
    path = tmp_path / name
    path.write_bytes(header(model, kind))
    sizes = (padded(n_bytes(dims, type_of(each, dims, kind, model))) for each, dims in model.tensors.items())
    os.truncate(path, path.stat().st_size + sum(sizes))  # a hole where the data would be
    file = open_gguf(path)
    config = config_of(file)
    assert config["num_hidden_layers"] == LAYERS.get(name, config["num_hidden_layers"])
    parse_config(config, name)
    found = checkpoint_of(file, config)
    used = {part.name for tensor in found.values() for part in tensor.parts}
    assert used == set(model.tensors)


def small() -> Shape:
    layer = norms(256, "attn_norm", "ffn_norm") | attention(256, 4, 2, 64) | mlp(256, 512)
    return shape("llama", 256, 96, [layer], feed_forward_length=512, attention__head_count=4)


@pytest.mark.parametrize(("kind", "logits"), [("bf16", "BF16"), ("q8_0", "Q8_0"), ("q4_0", "Q6_K")])
def test_weights_are_small_numbers_that_differ(kind: str, logits: str, tmp_path: Path) -> None:
    write_gguf(small(), kind, tmp_path / "m.gguf")
    file = open_gguf(tmp_path / "m.gguf")
    assert file.tensors["output.weight"].dtype == logits
    gate, up = (numbers(file.tensors[f"blk.0.ffn_{name}.weight"]).astype(np.float32) for name in ("gate", "up"))
    assert 0.01 < gate.std() < 0.04
    assert np.abs(gate).max() < 0.2
    assert (gate != up).mean() > 0.8


def test_both_sides_have_one_file_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "BUILD", tmp_path)
    monkeypatch.setitem(SHAPES, "small.gguf", small)
    ours, theirs = Entry.parse("llmc:int4+head"), Entry.parse("llama.cpp:q4_0")
    path = environments.make_gguf("small.gguf", ours)
    assert path == environments.make_gguf("small.gguf", theirs) == environments.model_path("small.gguf", theirs)
    assert environments.model_path("small.gguf", ours) != path
    assert told("small.gguf") == {"known_as": "small.gguf"}
    with pytest.raises(PeerError, match=r"hf does not read small\.gguf"):
        environments.make_gguf("small.gguf", Entry.parse("hf:bf16"))

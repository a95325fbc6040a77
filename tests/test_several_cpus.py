"""An artifact for several levels of CPUs: each level's program says the same, and the best that fits is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import llmc
from llmc.compiler.target import LEVELS, host_features
from llmc.runtime import format as fmt
from llmc.runtime.artifact import ArtifactFile, program_section
from tests.runtime.toy_artifact import pack_sections

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=16,
    bos_token_id=1,
    eos_token_id=2,
)
PROMPT = [5, 17, 3]
HERE = [f"cpu:{level}" for level, features in reversed(LEVELS.items()) if host_features().issuperset(features)]


def without(path: Path, n_programs: int) -> Path:
    """The artifact as a machine sees it that lacks something for the first programs."""
    data = path.read_bytes()
    with ArtifactFile.open(path) as file:
        sections = {name: data[s.offset : s.offset + s.n_bytes] for name, s in file.sections.items()}
    for name in (program_section("plan", number) for number in range(n_programs)):
        header = fmt.unpack_plan_header(sections[name])
        absent = fmt.pack_plan_header(header._replace(cpu_features=header.cpu_features | 1 << 31))
        sections[name] = absent + sections[name][len(absent) :]
    other = path.with_name(f"without{n_programs}.so")
    other.write_bytes(pack_sections(sections))
    return other


def test_the_best_level_that_fits_is_taken_and_all_say_the_same(tmp_path: Path) -> None:
    if len(HERE) < 2:
        pytest.skip("this machine has one level alone")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TINY).save_pretrained(tmp_path / "tiny")
    path = tmp_path / "several.so"
    report = llmc.compile(tmp_path / "tiny", out=path, target=HERE, dtype="f32", batch=(1,))
    assert report["targets"] == HERE
    assert report["notes"] == []
    assert (report["certificate"]["status"], report["certificate"]["target"]) == ("passed", HERE[0])
    said = []
    for number, target in enumerate(HERE):
        with llmc.load(without(path, number)) as model:
            assert (model.info.program, model.target) == (number, target)
            said.append((model.tokens(PROMPT, 10, ignore_eos=True), model.logits(PROMPT)))
    assert all(tokens == said[0][0] for tokens, _ in said)
    assert all(abs(logits - said[0][1]).max() < 1e-4 for _, logits in said)
    with pytest.raises(llmc.runtime.LlmcError) as caught:
        llmc.load(without(path, len(HERE)))
    assert f"none of the artifact's {len(HERE)} programs: cpu (this artifact needs" in caught.value.fact

"""Models with states on the emulated GPU, beside their source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, Mamba2Config, MambaConfig, Qwen3NextConfig

import llmc
from llmc.runtime.generation import GREEDY
from tests.cuda.conftest import EmulatedGpu
from tests.test_states import CONFIG, TOKENS

Array = np.ndarray[Any, Any]
LFM2 = Lfm2Config(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    layer_types=["conv", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)
MAMBA = Mamba2Config(
    vocab_size=160,
    hidden_size=64,
    num_hidden_layers=2,
    num_heads=8,
    head_dim=16,
    state_size=24,
    n_groups=2,
    max_position_embeddings=96,
)
FIRST_MAMBA = MambaConfig(
    vocab_size=160, hidden_size=64, num_hidden_layers=1, time_step_rank=8, max_position_embeddings=96
)
CONFIGS = {
    "mamba2": MAMBA,
    "mamba": FIRST_MAMBA,
    "qwen3_next": Qwen3NextConfig(**CONFIG | {"num_experts_per_tok": 4}),
    "lfm2": LFM2,
}
"""All experts are chosen: where two are as good, roundings would choose another."""
RULES = {
    "mamba2": {"causal_conv", "delta_rule"},
    "mamba": {"causal_conv", "selective_scan"},
    "qwen3_next": {"causal_conv", "delta_rule"},
    "lfm2": {"causal_conv"},
}

BESIDE = {"mamba2": {"Softplus"}, "mamba": set(), "qwen3_next": {"llmc.GatedRMSNorm"}, "lfm2": set()}
"""Of what may stand around a rule: the delta rule has its own gates."""


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_source(family: str, emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    """Of a prompt, of single tokens beside another sequence, and of a fork; running ahead says the same to the bit."""
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    source.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    wanted = source.float()(torch.tensor([TOKENS])).logits[0].detach().numpy()
    emulated_gpu.compile(tmp_path / "model", tmp_path / "gpu.so", dtype="bf16", batch=[2])
    with llmc.load(tmp_path / "gpu.so", kv_tokens=512) as model:
        records = model.manifest["schedules"]
        assert {record["rule"] for record in records if "Stateful" in record["op"]} == RULES[family]
        beside = {record["op"] for record in records} & {"Softplus", "llmc.GatedRMSNorm"}
        assert beside == BESIDE[family]
        close(model.logits(TOKENS[:-3]), wanted[:-3], wanted)
        with model.sequence() as sequence, model.sequence() as other:
            model.step([(other, TOKENS[:5]), (sequence, TOKENS[:-3])])
            with sequence.fork() as fork:
                for token, logits in zip(TOKENS[-3:], wanted[-3:], strict=True):
                    model.step([(sequence, [token]), (other, [3])])
                    close(sequence.logits(), logits, wanted)
                twin = other.fork()
                for _ in range(2):
                    tokens = model.advance([(fork, GREEDY), (other, GREEDY)])
                    assert tokens[1] == twin.sample()
                    model.step([(sequence, [3]), (twin, tokens[1:])])
                np.testing.assert_array_equal(other.logits(), twin.logits())
                twin.close()
    assert emulated_gpu.complaints() == []


def close(found: Array, wanted: Array, of: Array) -> None:
    """Within what bf16 leaves of a model that is as small."""
    assert np.abs(found - wanted).max() < 0.02 * np.ptp(of)

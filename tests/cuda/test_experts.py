"""Latent attention and a mixture of experts on the emulated GPU: the logits of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config

import llmc
from tests.cuda.conftest import EmulatedGpu

CONFIG = DeepseekV2Config(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    first_k_dense_replace=0,
    topk_method="greedy",
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=72,
    vocab_size=96,
    max_position_embeddings=32,
    initializer_range=0.3,
)


def test_logits_are_those_of_hugging_face(emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    """Token by token, in bf16; where the router's choice is a close one, another expert may be as right."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIG).eval()
    network.save_pretrained(tmp_path / "model")
    emulated_gpu.compile(tmp_path / "model", tmp_path / "gpu.so", dtype="bf16", batch=[1])
    tokens = [5, 17, 3, 90, 42, 8, 20]
    with torch.no_grad():
        wanted = network(torch.tensor([tokens])).logits[0].numpy()
    with llmc.load(tmp_path / "gpu.so", kv_tokens=256) as model, model.sequence() as sequence:
        found = np.concatenate([sequence.feed_for_logits([token]) for token in tokens])
        rules = {record["op"]: record["rule"] for record in model.manifest["schedules"] if "fallback" in record["rule"]}
    assert np.median(np.abs(found - wanted).max(axis=1)) < 0.01 * np.ptp(wanted)
    assert rules == {}
    assert emulated_gpu.complaints() == []

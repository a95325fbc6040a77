"""Mixtures of experts on the emulated GPU, with latents, with sinks, in chunks: the logits of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, GptOssConfig, Llama4TextConfig, Qwen3MoeConfig

import llmc
from tests.compiler.test_packed import in_gptq
from tests.cuda.conftest import EmulatedGpu

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
DEEPSEEK = DeepseekV2Config(
    **SIZES,
    num_key_value_heads=2,
    q_lora_rank=None,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=24,
    first_k_dense_replace=0,
    topk_method="greedy",
    n_routed_experts=3,
    moe_intermediate_size=72,
)
GPT_OSS = GptOssConfig(
    **SIZES,
    num_key_value_heads=1,
    head_dim=32,
    sliding_window=4,  # in the first layer of two kinds
    num_local_experts=3,
    intermediate_size=64,
    swiglu_limit=0.8,
)
LLAMA4 = Llama4TextConfig(
    **(SIZES | {"num_hidden_layers": 2, "num_experts_per_tok": 1}),
    num_key_value_heads=1,
    head_dim=32,
    no_rope_layers=[1, 0],  # the first one in chunks
    attention_chunk_size=4,
    floor_scale=2,
    moe_layers=[0],
    num_local_experts=3,
    intermediate_size=64,
    intermediate_size_mlp=64,
)
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) / 16


def network_of(config: Any) -> Any:
    """A random model; gpt-oss's experts are numbers that mxfp4 has, its sinks count."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")) and config is GPT_OSS:
                signs = torch.randint(0, 2, parameter.shape) * 2 - 1
                parameter.copy_(NUMBERS[torch.randint(0, 8, parameter.shape)] * signs)
            if name.endswith("sinks"):
                parameter.normal_(0, 2)
    return network


@pytest.mark.parametrize(
    ("config", "quant", "without_kernels"),
    [(DEEPSEEK, "none", set()), (GPT_OSS, "mxfp4", set()), (LLAMA4, "none", {"ReduceMax"})],
    ids=["deepseek", "gpt-oss", "llama4"],
)
def test_logits_are_those_of_hugging_face(
    config: Any, quant: str, without_kernels: set[str], emulated_gpu: EmulatedGpu, tmp_path: Path
) -> None:
    """Token by token, in bf16; where the router's choice is a close one, another expert may be as right."""
    network = network_of(config)
    network.save_pretrained(tmp_path / "model")
    emulated_gpu.compile(tmp_path / "model", tmp_path / "gpu.so", dtype="bf16", batch=[1], quant=quant)
    tokens = [5, 17, 3, 90, 42, 8, 20]
    with torch.no_grad():
        wanted = network(torch.tensor([tokens])).logits[0].numpy()
    with llmc.load(tmp_path / "gpu.so", kv_tokens=256) as model, model.sequence() as sequence:
        found = np.concatenate([sequence.feed_for_logits([token]) for token in tokens])
        left = {record["op"] for record in model.manifest["schedules"] if "fallback" in record["rule"]}
    assert np.median(np.abs(found - wanted).max(axis=1)) < 0.01 * np.ptp(wanted)
    assert left == without_kernels
    assert emulated_gpu.complaints() == []


def test_experts_whose_codes_have_zeros_keep_them(emulated_gpu: EmulatedGpu, tmp_path: Path) -> None:
    """As float32 on a CPU says with the same numbers."""
    config = Qwen3MoeConfig(**SIZES, num_key_value_heads=1, head_dim=32, moe_intermediate_size=64, num_experts=3)
    network_of(config).save_pretrained(tmp_path / "model")
    folder, tokens = in_gptq(tmp_path / "model", tmp_path / "gptq", zeros=True), [5, 17, 3, 90, 42, 8, 20]
    llmc.compile(folder, out=tmp_path / "cpu.so", dtype="f32", batch=[1], verify=False)
    with llmc.load(tmp_path / "cpu.so", kv_tokens=256) as model:
        wanted = model.logits(tokens)
    emulated_gpu.compile(folder, tmp_path / "gpu.so", dtype="bf16", batch=[1], quant="int4")
    with llmc.load(tmp_path / "gpu.so", kv_tokens=256) as model:
        layouts = [weight["layout"] for weight in model.manifest["weights"] if "experts" in weight["name"]]
        assert [layout for layout in layouts if "z4" in layout] == layouts
        found = np.array(model.logits(tokens))
    assert np.median(np.abs(found - wanted).max(axis=1)) < 0.01 * np.ptp(wanted)
    assert emulated_gpu.complaints() == []

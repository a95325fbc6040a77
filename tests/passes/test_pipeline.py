"""passes/__init__.py: the whole road from Hugging Face to the step graph, run in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from llmc import passes
from llmc.compiler import graph
from llmc.compiler.frontend.export import export_graph
from llmc.compiler.weights import Weight

VOCABULARY, N_CONTEXT, LENGTH = 101, 96, 12
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
ONE_LAYER = SMALL | {"num_hidden_layers": 1}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama_grouped_biased_tied": lambda: transformers.LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama3": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama_yarn": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
    "opt": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=64),
    "opt_350m": lambda: transformers.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "qwen2": lambda: transformers.Qwen2Config(**ONE_LAYER),
    "qwen3": lambda: transformers.Qwen3Config(**ONE_LAYER, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**ONE_LAYER, sliding_window=5),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=5, query_pre_attn_scalar=20),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**ONE_LAYER),
    "phi3": lambda: transformers.Phi3Config(**ONE_LAYER),
    "mixtral": lambda: transformers.MixtralConfig(**ONE_LAYER, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **ONE_LAYER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48
    ),
}
LLAMA = ["Linear", "RotaryPagedAttention", "Linear", "AddRMSNorm", "GatedLinearSilu", "Linear", "AddRMSNorm"]
LAYERS = {
    "llama": LLAMA,
    "llama_yarn": LLAMA,
    "llama_grouped_biased_tied": [
        *("LinearBias", "RotaryPagedAttention", "LinearBias", "AddRMSNorm"),
        *("GatedLinearSiluBias", "LinearBias", "AddRMSNorm"),
    ],
    "opt": [
        *("LinearBias", "PagedAttention", "LinearBias", "AddLayerNorm"),
        *("LinearBiasRelu", "LinearBias", "AddLayerNorm"),
    ],
}
AROUND = {
    "llama": Counter({"Gather": 4, "RMSNormalization": 1, "llmc.Linear": 1}),
    "llama_yarn": Counter({"Gather": 4, "RMSNormalization": 1, "llmc.Linear": 1}),
    "llama_grouped_biased_tied": Counter({"Gather": 4, "RMSNormalization": 1, "llmc.Linear": 1}),
    "opt": Counter({"Gather": 3, "llmc.AddLayerNorm": 1, "llmc.Linear": 1}),
}


@cache
def export(name: str) -> ir.Model:
    """The exported graph, its weights without values. Take a clone."""
    return export_graph(CONFIGS[name]())


def bind_weights(model: ir.Model, weight: Callable[[str, list[int]], Weight]) -> ir.Model:
    """A clone with a weight for each initializer that has no value."""
    model = graph.clone(model)
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.shape is not None:
            value.const_value = weight(name, list(value.shape.numpy()))
    return model


class Example:
    """A model with random weights: its step graph, what the passes said, and Hugging Face's logits for one text."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        config = CONFIGS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        self.name = name
        self.history: list[tuple[str, int, int]] = []
        self.tokens = np.random.default_rng(0).integers(0, VOCABULARY, LENGTH)
        with torch.no_grad():
            self.wanted = reference(torch.tensor(self.tokens[None]), use_cache=False).logits[0].numpy()
        tensors = reference.state_dict()
        exported = bind_weights(export(name), lambda key, _: Weight.of_array(key, tensors[key].numpy()))
        self.step = passes.run(exported, n_context=N_CONTEXT, observe=self.observe)
        self.run = graph.runner(self.step)

    def observe(self, name: str, model: ir.Model, n_rewrites: int) -> None:
        for value in graph.values(model.graph):
            assert value.shape is not None, f"{name} left {value.name} without a shape"
            assert value.dtype is not None, f"{name} left {value.name} without a type"
            assert all(isinstance(size, int) or size.value for size in value.shape), f"{name}: {value.name}"
        self.history.append((name, n_rewrites, len(model.graph)))

    def logits(self, chunks: list[int]) -> np.ndarray[Any, Any]:
        """Logits of the text fed in chunks of these sizes, through one cache."""
        shapes = graph.bind(self.step, {"M": 1, "R": 1, "P": 2, "n_pages": 4})
        inputs = {str(value.name): shapes[value] for value in self.step.graph.inputs}
        caches = {name: np.full(shape, 9, np.float32) for name, shape in inputs.items() if "_cache" in name}
        found, start = [], 0
        for size in chunks:
            feeds = {
                "tokens": self.tokens[start : start + size],
                "positions": np.arange(start, start + size),
                "page_table": np.tile(np.array([2, 0]), (size, 1)),
                "rows": np.arange(size),
            }
            results = self.run(feeds | caches)
            caches = {name: results[f"{name}_out"] for name in caches}
            found.append(results["logits"])
            start += size
        return np.concatenate(found)


@pytest.fixture(scope="module", params=CONFIGS)
def example(request: pytest.FixtureRequest) -> Example:
    return Example(request.param)


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-5 * np.ptp(wanted))


def test_whole_text_gives_hugging_faces_logits(example: Example) -> None:
    assert close(example.logits([LENGTH]), example.wanted)


def test_decoding_after_a_prompt_gives_hugging_faces_logits(example: Example) -> None:
    assert close(example.logits([7, 1, 1, 1, 2]), example.wanted)


def test_step_graph_is_well_formed(example: Example) -> None:
    graph.check_step_graph(example.step)


def test_layers_are_the_operators_expected(example: Example) -> None:
    if example.name in LAYERS:
        layers = Counter(f"llmc.{op}" for op in LAYERS[example.name] * 2)
        assert graph.count_ops(example.step) == layers + AROUND[example.name]


def test_step_graph_reads_as_expected(example: Example, golden: Callable[[object], None]) -> None:
    golden(graph.to_text(example.step))


def test_passes_have_nothing_left_to_do(example: Example) -> None:
    text = graph.to_text(example.step)
    again = graph.clone(example.step)
    for name, rewrite in passes.pipeline(N_CONTEXT):
        assert rewrite(again) == 0, name
    assert graph.to_text(again) == text


def test_no_pass_reads_a_weight() -> None:
    def read() -> Any:
        raise AssertionError("a pass read a weight")

    for name in ("llama", "opt"):
        model = bind_weights(export(name), lambda key, shape: Weight(key, shape, read, "bf16"))
        passes.run(model, n_context=N_CONTEXT)
        weights = (value.const_value for value in model.graph.initializers.values())
        assert "bf16" in {weight.stored_dtype for weight in weights if isinstance(weight, Weight)}


def test_stages_are_written_as_text_and_onnx(tmp_path: Any) -> None:
    import onnx

    model = bind_weights(export("llama"), lambda key, shape: Weight.of_array(key, np.ones(shape, np.float32)))
    names: list[str] = []

    def observe(name: str, model: ir.Model, n_rewrites: int) -> None:
        graph.dump_stage(model, tmp_path, len(names), name)
        onnx.checker.check_model(str(tmp_path / f"{len(names):02d}_{name}.onnx"))
        names.append(name)

    passes.run(model, n_context=N_CONTEXT, observe=observe)
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == [f"{i:02d}_{n}.txt" for i, n in enumerate(names)]

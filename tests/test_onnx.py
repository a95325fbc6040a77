"""Models out of .onnx files: what exporters write means what the folder it was exported from means."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache

import llmc
from llmc import passes
from llmc.cli.main import main
from llmc.compiler import graph
from llmc.compiler.frontend import load_source

N_CONTEXT, N_LAYERS, LENGTH = 64, 2, 12
SIZES: dict[str, Any] = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FEED = {"intermediate_size": 96, "max_position_embeddings": 192}
TINY = transformers.LlamaConfig(**SIZES, **FEED, bos_token_id=1, eos_token_id=2)
LLAMA = transformers.LlamaConfig(**SIZES, **FEED, num_key_value_heads=2)
ONE_LAYER = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, **FEED, num_key_value_heads=2)
OPT = transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=192)
MISTRAL = transformers.MistralConfig(**SIZES, **FEED, num_key_value_heads=2, sliding_window=5)
NAMES = ["input_ids", "attention_mask", "position_ids"]
PAST = [f"past_key_values.{layer}.{what}" for layer in range(N_LAYERS) for what in ("key", "value")]
PRESENT = [name.replace("past_key_values", "present") for name in PAST]


class Whole(torch.nn.Module):
    """A model called without a cache, by the names of its inputs."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Any) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits


class Step(torch.nn.Module):
    """A model called with the keys and values of earlier tokens: logits, and these with the new tokens'."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        cache = DynamicCache(config=self.model.config)
        for layer in range(N_LAYERS):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache}
        if self.model.config.model_type != "opt":  # which counts positions by the mask
            inputs["position_ids"] = position_ids
        result = self.model(**inputs, use_cache=True)
        return result.logits, *(kept for layer in cache.layers for kept in (layer.keys, layer.values))


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of much
        yield


def model_of(config: Any, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def export(model: Any, path: Path, *, names: list[str], past: bool, dynamo: bool) -> None:
    ids = torch.ones(2, 11, dtype=torch.long)
    inputs = [ids, torch.ones(2, 16 if past else 11, dtype=torch.long), torch.arange(11).expand(2, 11).contiguous()]
    given = dict(zip(NAMES, inputs, strict=True))
    heads = getattr(model.config, "num_key_value_heads", 4)
    cache = [torch.ones(2, heads, 5, 16) for _ in PAST] if past else []
    arguments = (*(given[name] for name in names), *cache)
    module = (Step(model) if past else Whole(model, names)).eval()
    settings: dict[str, Any] = {"input_names": [*names, *(PAST if past else [])], "verbose": False}
    settings["output_names"] = ["logits", *(PRESENT if past else [])]
    with torch.no_grad():
        if dynamo:
            shapes = (tuple({0: Dim("batch"), 1: Dim("sequence")} for _ in names),)
            torch.onnx.export(module, arguments, path, dynamo=True, opset_version=23, dynamic_shapes=shapes,
                              external_data=False, **settings)  # fmt: skip
        else:
            axes: Any = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
            axes |= {name: {0: "batch", 2: "past"} for name in (PAST + PRESENT if past else [])}
            axes["attention_mask"] = {0: "batch", 1: "total"}
            torch.onnx.export(module, arguments, path, dynamo=False, opset_version=17, dynamic_axes=axes, **settings)


def step_graph_logits(path: Path, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the step graph that a file becomes, in ONNX Runtime, the first tokens at once and the last by itself."""
    source = load_source(str(path), dtype="f32", max_sequence=N_CONTEXT)
    passes.run_steps(source.graph, passes.file_steps(N_CONTEXT))
    step = passes.run(source.graph, n_context=N_CONTEXT)
    graph.check_step_graph(step)
    assert graph.count_ops(step).keys() <= EXPECTED
    run = graph.runner(step)
    shapes = {str(v.name): s for v, s in graph.bind(step, {"M": 1, "R": 1, "P": 1, "n_pages": 1}).items()}
    inputs = [str(value.name) for value in step.graph.inputs]
    caches = {name: np.zeros(shapes[name], np.float32) for name in inputs if "_cache" in name}
    found = []
    for rows in (slice(0, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        places = np.arange(LENGTH)[rows]
        feeds = {"tokens": tokens[rows], "positions": places, "rows": places - places[0]}
        results = run(feeds | {"page_table": np.zeros((len(places), 1), np.int64)} | caches)
        caches = {name: results[f"{name}_out"] for name in caches}
        found.append(results["logits"])
    return np.concatenate(found)


LINEAR = {"llmc.Linear", "llmc.LinearBias", "llmc.LinearBiasRelu", "llmc.GatedLinearSilu"}
EXPECTED = LINEAR | {"Gather", "RMSNormalization", "llmc.AddRMSNorm", "llmc.AddLayerNorm"}
EXPECTED |= {"llmc.RotaryPagedAttention", "llmc.PagedAttention"}
"""What the operators of a layer are, when everything was recognised."""


@pytest.mark.parametrize(
    ("config", "attention", "names", "past", "dynamo"),
    [
        (ONE_LAYER, "sdpa", NAMES, False, True),
        (LLAMA, "eager", NAMES, True, False),
        (OPT, "sdpa", NAMES, True, False),
        (OPT, "eager", NAMES[:2], False, False),
        (MISTRAL, "eager", NAMES, False, False),
    ],
    ids=[
        "llama",
        "llama_torchscript_past",
        "opt_torchscript_past",
        "opt_torchscript",
        "mistral_torchscript",
    ],
)
def test_an_exported_model_means_the_same(
    tmp_path: Path, config: Any, attention: str, names: list[str], *, past: bool, dynamo: bool
) -> None:
    model = model_of(config, attention)
    export(model, tmp_path / "tiny.onnx", names=names, past=past, dynamo=dynamo)
    tokens = np.random.default_rng(0).integers(0, 160, LENGTH)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens[None])).logits[0].numpy()
    assert np.abs(step_graph_logits(tmp_path / "tiny.onnx", tokens) - wanted).max() <= 1e-5 * np.ptp(wanted)


def test_a_file_and_its_folder_compile_to_the_same_bits(tmp_path: Path) -> None:
    model = model_of(TINY, "eager")
    model.save_pretrained(tmp_path / "folder")
    export(model, tmp_path / "tiny.onnx", names=NAMES, past=False, dynamo=False)
    options: dict[str, Any] = {"dtype": "f32", "batch": (1, 2)}
    llmc.compile(tmp_path / "folder", out=tmp_path / "folder.so", verify=False, **options)
    report = llmc.compile(tmp_path / "tiny.onnx", out=tmp_path / "file.so", max_sequence=192, **options)
    with llmc.load(tmp_path / "file.so") as file:
        assert file.manifest["model"]["n_layers"] == N_LAYERS
    certificate = report["certificate"]
    assert (certificate["status"], *certificate["reference"]["versions"]) == ("passed", "onnxruntime")
    tokens = [5, 17, 3, 99, 42]
    with llmc.load(tmp_path / "folder.so") as folder, llmc.load(tmp_path / "file.so") as file:
        np.testing.assert_array_equal(file.logits(tokens), folder.logits(tokens))
        assert file.tokens(tokens, max_tokens=16) == folder.tokens(tokens, max_tokens=16)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "file.so"), "--against", str(tmp_path / "tiny.onnx")])
    assert result.exit_code == 0
    assert "logits within" in result.stdout

"""Of a model that takes images too, the text part compiles and says what the whole says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import llmc
from llmc.compiler import graph
from llmc.compiler.frontend import load_source
from llmc.compiler.frontend.text_of_whole import check_head
from llmc.compiler.frontend.text_part import text_fields
from llmc.runtime.errors import LlmcError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> PreTrainedModel:
    text = SIZES | {"sliding_window": 24, "query_pre_attn_scalar": 16}
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    )


def gemma4() -> PreTrainedModel:
    text = SIZES | {"sliding_window": 24, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 16}
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, audio_config=None))


def mistral3(tied: bool) -> PreTrainedModel:
    text, vision = SIZES | {"model_type": "mistral"}, VISION | {"model_type": "pixtral", "head_dim": 16}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=90, tie_word_embeddings=tied)
    return Mistral3ForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    """transformers has its text part with pictures alone."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    text = SIZES | {"rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


MAKERS = {"gemma3": gemma3, "gemma4": gemma4, "qwen2_vl": qwen2_vl}


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral3", "mistral3 tied", "qwen2_vl"])
def test_the_text_part_says_what_the_whole_model_says(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = MAKERS.get(kind, lambda: mistral3(tied="tied" in kind))()
    whole.save_pretrained(tmp_path / "whole")
    report = llmc.compile(tmp_path / "whole", out=tmp_path / "model.so", batch=(1,), max_sequence=32)
    assert any("only the text part of whole is compiled" in note for note in report["notes"])
    assert report["certificate"]["status"] == "passed"
    ids = [5, 9, 30, 77, 12, 3]
    with torch.no_grad():
        wanted = whole.eval()(input_ids=torch.tensor([ids])).logits[0].numpy()
    with llmc.load(tmp_path / "model.so") as model:
        assert np.abs(model.logits(ids) - wanted).max() <= 1e-5 * np.ptp(wanted)


def test_what_the_part_leaves_open_the_whole_says() -> None:
    text = {"model_type": "llama", "eos_token_id": None, "bos_token_id": 4}
    fields = {"dtype": "bfloat16", "eos_token_id": [2, 7], "bos_token_id": 1, "text_config": text}
    assert text_fields(fields, "somewhere") == text | {"dtype": "bfloat16", "eos_token_id": [2, 7]}


def test_in_older_files_its_fields_are_among_those_of_the_whole(tmp_path: Path) -> None:
    qwen2_vl().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    before = load_source(str(tmp_path))
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    older = {**text, **fields, "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    file.write_text(json.dumps(older))
    after = load_source(str(tmp_path))
    assert after.is_part
    assert after.config["model_type"] == before.config["model_type"] == "qwen2_vl_text"
    assert graph.to_text(after.graph) == graph.to_text(before.graph)
    assert after.weights.keys() == before.weights.keys()


def test_a_model_without_a_text_part_that_has_pictures_is_none() -> None:
    fields = {"model_type": "llama", "vision_config": {}}
    assert text_fields(fields, "somewhere") is None


def test_logits_that_are_more_than_a_head_are_refused() -> None:
    whole = qwen2_vl()
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    check_head(whole, decoder, head)
    forward = whole.forward
    whole.forward = lambda **given: SimpleNamespace(logits=2 * forward(**given).logits)
    with pytest.raises(LlmcError, match="are more than a product of what its text part makes"):
        check_head(whole, decoder, head)


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_other_names_of_its_tensors_are_found(prefix: str, tmp_path: Path) -> None:
    """As transformers has them in memory, and in a checkpoint of the text part alone."""
    gemma3().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = {name: weight.numpy() for name, weight in load_source(str(tmp_path)).weights.items()}
    tensors = {name.replace("language_model.model.", prefix): tensor for name, tensor in load_file(file).items()}
    if prefix == "model.":
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    save_file(tensors, file)
    after = load_source(str(tmp_path)).weights
    assert after.keys() == before.keys()
    for name, values in before.items():
        assert np.array_equal(after[name].numpy(), values)

"""Small models that take pictures, made from configurations: the tower, what joins it to the text, and the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from llmc.compiler.frontend.quiet import quiet
from tests.pictured import ANY_SIZE, N_VOCAB, PATCH, SIDE, token_of, tokenizer

LAYERS = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": 2 * SIDE, "patch_size": PATCH}
TEXT = {
    **LAYERS,
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION_MARKS = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}


def config_of(kind: str, vision: dict[str, Any] | None = None) -> PretrainedConfig:
    """vision: other fields of the tower's configuration."""
    more, mark = vision or {}, {"image_token_index": token_of("llava")}
    if kind == "llava":
        return LlavaConfig(vision_config=CLIP | more, text_config=TEXT, **mark)
    if kind == "llava siglip":
        whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        return LlavaConfig(vision_config=SIGLIP | more, text_config=TEXT, **whole, **mark)
    if kind == "idefics3":
        token = token_of(kind)
        return Idefics3Config(vision_config=VISION | more, text_config=TEXT, image_token_id=token, scale_factor=2)
    if kind == "internvl":
        text, sides = TEXT | {"model_type": "qwen2"}, [VISION["image_size"]] * 2
        normed = {"image_size": sides, "patch_size": [PATCH] * 2, "use_qk_norm": True}
        return InternVLConfig(vision_config=VISION | normed | more, text_config=text, image_token_id=token_of(kind))
    if kind == "gemma3":
        text = TEXT | {"model_type": "gemma3_text", "sliding_window": 24}
        return Gemma3Config(
            vision_config=SIGLIP | more, text_config=text, mm_tokens_per_image=4, image_token_index=token_of(kind)
        )
    if kind in ANY_SIZE:
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        text = {name: value for name, value in TEXT.items() if name not in ("model_type", "head_dim")}
        marks = {f"{name}_token_id": tokenizer().token_to_id(mark) for name, mark in VISION_MARKS.items()}
        ends = {"bos_token_id": None, "eos_token_id": None}
        patched = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "hidden_size": 64}
        if kind == "qwen2_vl":
            vision = patched | {"embed_dim": 48, "mlp_ratio": 2} | more
            return Qwen2VLConfig(vision_config=vision, text_config=text | {"rope_scaling": rope} | ends, **marks)
        if kind == "qwen3_5":
            turned = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            of_text = {name: value for name, value in TEXT.items() if name != "model_type"}
            of_text |= {"rope_parameters": turned | {"partial_rotary_factor": 1.0}}
            of_text |= {"layer_types": ["full_attention"] * 2}
            vision = patched | {"intermediate_size": 96, "out_hidden_size": 64, "num_position_embeddings": 36} | more
            return Qwen3_5Config(vision_config=vision, text_config=of_text | ends, **marks)
        if kind == "qwen3_vl":
            vision = patched | {"intermediate_size": 96, "out_hidden_size": 64, "num_position_embeddings": 36} | more
            vision |= {"deepstack_visual_indexes": [1]}
            in_turns = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            text |= {"head_dim": 16, "rope_parameters": in_turns} | ends
            return Qwen3VLConfig(vision_config=vision, text_config=text, **marks)
        vision = patched | {"intermediate_size": 96, "out_hidden_size": 64, "window_size": 8 * PATCH} | more
        vision |= {"fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(vision_config=vision, text_config=text | {"rope_scaling": rope} | ends, **marks)
    if kind == "paligemma":
        text = TEXT | {"model_type": "gemma"}
        return PaliGemmaConfig(vision_config=SIGLIP | more, text_config=text, projection_dim=64, **mark)
    return LlavaNextConfig(vision_config=CLIP | more, text_config=TEXT, **mark)


def save_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights, no two parts of a picture of which look alike to it; saved."""
    torch.manual_seed(0)
    with quiet():
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        model = model.to(dtype)
        model.save_pretrained(folder)
    return model


def rows_of(model: PreTrainedModel, tile: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What transformers makes of a tile float32 [3, H, W]: float32 [n, d]."""
    pixels = torch.from_numpy(tile).to(model.dtype)[None]
    with torch.no_grad():
        if model.config.model_type == "idefics3":
            pixels = pixels[None]
        made: Any = model.get_image_features(pixel_values=pixels).pooler_output
    rows = made if isinstance(made, torch.Tensor) else torch.cat(tuple(made))
    return rows.reshape(-1, rows.shape[-1]).float().numpy()

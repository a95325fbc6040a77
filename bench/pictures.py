"""Seconds that a picture's tile takes in a tower: artifacts and transformers, in turns, in one process.

    python bench/pictures.py [--shapes smolvlm-256m,llava-1.5] [--dtypes bf16,f32] [--rounds 9] [--threads 2]
                             [--folder build/pictures] [--record bench/records/NAME.json]

The weights are random, and what reads texts is small: a tower knows nothing of it.  transformers is asked for the same
tile by get_image_features.  A figure is the median over rounds; the first round does not count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Idefics3Config, LlavaConfig, PretrainedConfig

import llmc
from llmc.bench.limits import cpu_name

TOKEN = 5
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
REST_S = 0.05
"""Between two measurements: threads of the one spin for a moment, and would share the CPUs with the other."""
Tower = Callable[[], Any]


def text_of(size: int) -> dict[str, Any]:
    """The configuration of a decoder with rows of this size."""
    heads = {"num_attention_heads": size // 64, "num_key_value_heads": size // 64, "head_dim": 64}
    layers = {"hidden_size": size, "intermediate_size": 256, "num_hidden_layers": 1, **heads}
    return {"model_type": "llama", "vocab_size": 320, "max_position_embeddings": 2048, **layers}


def vision_of(size: int, n_layers: int, n_heads: int, side: int, patch: int) -> dict[str, Any]:
    layers = {"hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": n_layers}
    return {**layers, "num_attention_heads": n_heads, "image_size": side, "patch_size": patch}


def shapes() -> dict[str, PretrainedConfig]:
    clip = {"model_type": "clip_vision_model", **vision_of(1024, 24, 16, 336, 14)}
    return {
        "smolvlm-256m": Idefics3Config(
            vision_config=vision_of(768, 12, 12, 512, 16),
            text_config=text_of(576),
            scale_factor=4,
            image_token_id=TOKEN,
        ),
        "llava-1.5": LlavaConfig(vision_config=clip, text_config=text_of(4096), image_token_index=TOKEN),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default=",".join(shapes()))
    parser.add_argument("--dtypes", default="bf16,f32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/pictures"))
    parser.add_argument("--only-compile", action="store_true")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for shape in options.shapes.split(","):
        config, towers = shapes()[shape], dict[str, Tower]()
        for dtype in options.dtypes.split(","):
            path = compiled(config, dtype, options.folder / shape)
            if not options.only_compile:
                model = llmc.load(path, threads=options.threads)
                tile = np.random.default_rng(0).normal(size=model.info.tile).astype(np.float32)
                towers[f"llmc {dtype}"] = partial(model.image, tile)
                towers[f"transformers {dtype}"] = of_torch(config, tile, DTYPES[dtype])
        results += [{"shape": shape, **one} for one in measured(towers, options.rounds)]
    for one in results:
        least, most = one["range"]
        print(f"{one['shape']:14} {one['tower']:18} {one['seconds']:.3f} s ({least:.3f} to {most:.3f})")
    if options.record:
        said = {"machine": f"{cpu_name()}, {options.threads} threads", "date": datetime.date.today().isoformat()}
        said |= {"command": " ".join(["python", *sys.argv]), "rounds": options.rounds}
        options.record.write_text(json.dumps({**said, "results": results}, indent=1) + "\n")


def compiled(config: PretrainedConfig, dtype: str, folder: Path) -> Path:
    path = folder / f"{dtype}.so"
    if not path.is_file():
        config.save_pretrained(folder)
        how: Any = {"weights": "random", "images": True, "dtype": dtype, "batch": (1,), "max_sequence": 1024}
        llmc.compile(folder, out=path, **how)
    return path


def of_torch(config: PretrainedConfig, tile: np.ndarray[Any, Any], dtype: torch.dtype) -> Tower:
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    pixels = torch.from_numpy(tile).to(dtype)[None]
    pixels = pixels[None] if config.model_type == "idefics3" else pixels

    @torch.inference_mode()
    def features() -> Any:
        return model.get_image_features(pixel_values=pixels)

    return features


def measured(towers: dict[str, Tower], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in towers}
    for number in range(rounds + 1):
        for name, tower in towers.items():
            time.sleep(REST_S)
            began = time.perf_counter()
            tower()
            if number:
                times[name].append(time.perf_counter() - began)
    return [
        {
            "tower": name,
            "seconds": round(statistics.median(found), 4),
            "range": [round(min(found), 4), round(max(found), 4)],
        }
        for name, found in times.items()
    ]


if __name__ == "__main__":
    main()

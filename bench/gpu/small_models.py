"""Small checkpoints, compiled whole for a kit, and what float32 on a CPU says of a few texts (families.py asks it).

As much of a difference as the CPU's own bf16 makes is nobody's fault: it is kept beside the logits.  A checkpoint whose
folder has one of adapters, ADAPTERS, is compiled with all of them, by their folders' names.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import llmc
from llmc.bench.gpu.families import N_TEXTS, N_TOKENS, Array, adapter_of, distance, text
from llmc.bench.gpu.kit import SMALL
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError

ADAPTERS = "adapters"
BATCH = (1, 4)
ROOM = 2048
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({"quant": "int8"}, {"quant": "int4"}, {"quant": "fp8"}, {"kv_dtype": "int8"}, {"dtype": "f16"}),
    **dict.fromkeys(("llama-zeros", "qwen3_moe-zeros"), ({"quant": "int4"},)),
    "opt": ({"quant": "int8", "kv_dtype": "int8"}, {"dtype": "f16"}),
    "bert": ({"quant": "int8"}, {"quant": "int4"}, {"dtype": "f16"}),
}
"""How else checkpoints are compiled, by the names of their folders."""


def add_small(out: Path, folder: Path, target: Target) -> dict[str, dict[str, Any]]:
    """Every checkpoint in a folder as kit.json has it, its artifact and what it must say in the kit beside it.

    One that cannot be compiled for the target is left out, and said.  All artifacts are compressed as one: kernels of
    theirs are alike.
    """
    said = {}
    with (
        tempfile.TemporaryDirectory(prefix="llmc-small-") as place,
        tarfile.open(out / SMALL, "w:xz", preset=9) as file,
    ):
        for checkpoint, options in checkpoints(folder):
            name = "-".join([checkpoint.name, *options.values()])
            print(f"{name}: compiled", file=sys.stderr)
            try:
                said[name] = add(Path(place), name, checkpoint, options, target)
            except LlmcError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        for path in sorted(path for path in Path(place).iterdir() if path.stem in said):
            file.add(path, path.name)
    return said


def checkpoints(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(path for path in folder.iterdir() if (path / "config.json").exists()):
        yield from ((path, options) for options in ({}, *MORE.get(path.name, ())))


def add(out: Path, name: str, checkpoint: Path, options: dict[str, Any], target: Target) -> dict[str, Any]:
    """Of one: how far bf16 on a CPU is from float32, in the standard deviation of logits."""
    compiled = {"dtype": "bf16", **options, "batch": BATCH, "verify": False, "max_sequence": 2 * N_TOKENS}
    compiled["adapters"] = [f"{path.name}={path}" for path in sorted((checkpoint / ADAPTERS).glob("*"))]
    llmc.compile(checkpoint, out=out / f"{name}.so", target=str(target), **compiled)
    with tempfile.TemporaryDirectory(prefix="llmc-small-") as place:
        exact = said_by(checkpoint, Path(place, "f32.so"), {**compiled, "dtype": "f32", "kv_dtype": "f32"})
        rounded = said_by(checkpoint, Path(place, "bf16.so"), {**compiled, "dtype": "bf16"})
    np.savez(out / f"{name}.npz", logits=exact.astype(np.float16))  # finer than what is allowed
    return {"cpu_error": distance(rounded, exact), "options": options}


def said_by(checkpoint: Path, path: Path, options: dict[str, Any]) -> Array:
    """[texts, tokens, words]: the logits of a program for this CPU; an encoder's are what it makes of texts so far."""
    llmc.compile(checkpoint, out=path, **options)
    with llmc.load(path, kv_tokens=ROOM) as model:
        texts = [(text(number, model.info.n_tokens), adapter_of(model, number)) for number in range(N_TEXTS)]
        return np.stack([np.array(model.logits(ids, adapter)) for ids, adapter in texts])

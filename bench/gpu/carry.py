"""Write a planned model into a kit: all of its artifact but the weights, and how those are made (fill.py)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc import __version__
from llmc.bench.gpu.kit import layout_to_json
from llmc.bench.gpu.recipes import recipe_of
from llmc.compiler import artifact, driver, report
from llmc.compiler.target import Target
from llmc.runtime import format as fmt
from llmc.schedules import cache

if TYPE_CHECKING:
    from llmc.bench.gpu.prepare import Planned


def write_model(folder: Path, planned: Planned, target: Target) -> None:
    """folder: of the model in the kit.  Reads every weight once, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    program, source = planned.program, planned.source
    tables: dict[str, Any] = {}
    weights = []
    for weight in program.weights:
        name = str(weight.value.name)
        tensor: Any = weight.value.const_value
        weights.append(
            {
                "name": name,
                "offset": weight.offset,
                "bytes": weight.n_bytes,
                "shape": [int(str(size)) for size in tensor.shape],
                "layout": layout_to_json(weight.layout),
                "recipe": recipe_of(name, tensor, tables),
            }
        )
    write_sections(folder / "sections.zip", planned, target)
    np.savez_compressed(folder / "tables.npz", **tables)
    drawn = {name: weight.name for name, weight in source.weights.items()}
    config = source.config
    said = {
        "name": planned.wanted.name,
        "config": config,
        "dtype": source.dtype,
        "std": float(config.get("initializer_range") or config.get("init_std") or 0.02),
        "seed": 0,
        "names": drawn,
        "n_context": source.n_context,
        "n_vocab": source.n_vocab,
        "quant": planned.wanted.quant,
        "notes": list(source.notes),
        "weight_bytes": program.weight_bytes,
        "weights": weights,
    }
    (folder / "model.json").write_text(json.dumps(said))


def write_sections(path: Path, planned: Planned, target: Target) -> None:
    """Everything that compile_model writes but the weights, each section under its name."""
    program, source, wanted = planned.program, planned.source, planned.wanted
    code, images = driver.linked(program, target, cache.compile_kernels(program.kernels, target))
    switched = [str(each) for each in planned.tuned.on(target)]
    manifest = report.manifest(
        source, target, program, wanted.batch, planned.scheme, source.dtype, switched, version=__version__
    )
    manifest["certificate"] = {"status": "skipped", "reason": "random weights"}
    bos = -1 if source.bos is None else source.bos
    sections = {
        "code": code,
        "plan": artifact.encode_plan(program, target, source.eos, bos),
        "cuda": fmt.pack_images(images),
        "graph": planned.graph_section,
        "manifest": json.dumps(manifest).encode(),
    }
    if source.vocabulary is not None:
        sections["vocabulary"] = artifact.encode_vocabulary(source.vocabulary)
    if source.tokenizer_json is not None:
        sections["tokenizer"] = source.tokenizer_json
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name, data in sections.items():
            out.writestr(name, data)

"""MODEL or FILE.so -> what is measured: an artifact, and what the baselines load in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc import __version__
from llmc.bench.chart import memory
from llmc.bench.chart.record import Panel
from llmc.bench.chart.request import Request, files_folder, in_k
from llmc.compiler.target import missing, parse_target
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError

Progress = Callable[[str, int, int], None]
TITLES = {"llama2-7b": "Llama2-7B", "llama2-13b": "Llama2-13B", "llama3-8b": "Llama3-8B", "tinyllama-1.1b": "TinyLlama"}


@dataclass(frozen=True)
class Subject:
    """An artifact, and where the baselines find its weights: `source` with `weights`, as load_source takes them.

    lengths: those of the panel's that are measured with it.
    """

    artifact: Path
    manifest: dict[str, Any]
    source: str
    weights: str
    lengths: tuple[int, ...]
    panel: Panel

    @property
    def device(self) -> str:
        return "cuda" if self.manifest["target"]["name"].startswith("cuda") else "cpu"

    @property
    def dtype(self) -> str:
        return str(self.manifest["model"]["dtype"])

    @property
    def quant(self) -> str | None:
        return (self.manifest.get("quant") or {}).get("name")


def subjects(model: str, request: Request, progress: Progress) -> list[Subject]:
    """One, or two when real weights meet lengths beyond the model's positions: those take random ones.

    Compiles what is not there yet.  Raises LlmcError.
    """
    if Path(model).suffix == ".so" or Path(model).is_file():
        return [of_artifact(Path(model), request)]
    from llmc.compiler.frontend.known import KNOWN_MODELS

    known = KNOWN_MODELS.get(model.lower())
    weights = request.weights or ("random" if known else "real")
    config = known.config if known else read_config_of(model)
    published = int(config.get("max_position_embeddings") or max(request.lengths))
    name = model.lower() if known else Path(model).name
    within = tuple(length for length in request.lengths if length <= published)
    beyond = tuple(length for length in request.lengths if length > published)
    if beyond and weights == "random":
        within, beyond = (), request.lengths
    parts = [(model, weights, within)] if within else []
    parts += [(str(extended(name, config, beyond[-1])), "random", beyond)] if beyond else []
    made = []
    for source, kind, lengths in parts:
        artifact = compiled(source, name, kind, lengths[-1], request, progress)
        manifest = manifest_of(artifact)
        panel = panel_of(name, manifest, published, request, "real" if within and weights == "real" else kind)
        made.append(Subject(artifact, manifest, source, kind, lengths, panel))
    return made


def of_artifact(path: Path, request: Request) -> Subject:
    """Its source is what --source names; without it, random weights of its shapes."""
    manifest = manifest_of(path)
    model = manifest["model"]
    weights, source = ("real", request.source) if request.source else ("random", None)
    if source is None:
        source = str(configured(files_folder() / "configurations" / model["name"], model["config"]))
    elif model["weights"] == "random":
        weights = "random"
    published = int(model["config"].get("max_position_embeddings") or model["n_context"])
    panel = panel_of(model["name"], manifest, published, request, model["weights"])
    if model["weights"] == "real" and request.source is None:
        panel.notes.append("baselines have random weights of the same shapes: --source names the model's own")
    return Subject(path, manifest, source, weights, request.lengths, panel)


def panel_of(name: str, manifest: dict[str, Any], published: int, request: Request, weights: str) -> Panel:
    quant = (manifest.get("quant") or {}).get("name")
    dtype, kv = manifest["model"]["dtype"], manifest["kv_cache"]["dtype"]
    precision = quant or dtype
    if kv != dtype:
        precision += f", {kv} KV cache"
    sizes = memory.weight_sizes(manifest)
    panel = Panel(
        name=f"{name} {precision}",
        title=title(name),
        precision=precision,
        weights=weights,
        batches=list(request.batches),
        lengths=list(request.lengths),
        published_context=published,
        model={
            "dtype": dtype,
            "artifact_bytes": manifest["artifact_bytes"],
            **sizes,
            "kv_bytes_per_token": manifest["kv_cache"]["bytes_per_token"],
            "kv_cache": manifest["kv_cache"],
            "n_weights": round(8 * memory.read_bytes(sizes, 1) / memory.bits(manifest)),
            "head_weights": memory.head_weights(manifest["model"]),
            "attention_width": memory.attention_width(manifest["model"]),
            "target": manifest["target"]["name"],
            "compiled": {manifest["model"]["name"]: manifest.get("created", "")},
        },
    )
    if any(length > published for length in request.lengths):
        panel.notes.append(
            f"* beyond the model's own {published} positions: random weights, {in_k(max(request.lengths))} positions"
        )
    return panel


def title(name: str) -> str:
    known = name.lower()
    return TITLES.get(known) or ("OPT-" + known.removeprefix("opt-").upper() if known.startswith("opt-") else name)


def compiled(source: str, name: str, weights: str, context: int, request: Request, progress: Progress) -> Path:
    """The artifact of a model, compiled now unless an earlier measurement with this llmc left it."""
    from llmc.compiler.driver import compile_model

    parts = [name, request.dtype or "", request.quant.replace("none", ""), request.kv_dtype or "", weights]
    target = request.target.replace(":", "-")
    stem = "-".join(filter(None, [*parts, in_k(context), target, "x".join(map(str, request.batches))]))
    path = files_folder() / f"{stem}.so"
    if usable(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    compile_model(
        source,
        out=path,
        target=request.target,
        dtype=request.dtype,
        quant=request.quant,
        kv_dtype=request.kv_dtype,
        batch=request.batches,
        max_sequence=context,
        weights=weights,
        verify=weights == "real",
        progress=progress,
    )
    return path


def usable(path: Path) -> bool:
    """Whether an artifact is there that this llmc wrote."""
    try:
        return path.exists() and manifest_of(path).get("llmc") == __version__
    except LlmcError:
        return False


def extended(name: str, config: dict[str, Any], positions: int) -> Path:
    """A folder with the model's configuration and more positions than it was made with."""
    return configured(
        files_folder() / "configurations" / f"{name}-{in_k(positions)}", config | {"max_position_embeddings": positions}
    )


def configured(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def read_config_of(model: str) -> dict[str, Any]:
    """The configuration of a folder or a hub id."""
    from llmc.compiler.frontend import hub
    from llmc.compiler.frontend.config import read_config

    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        if not hub.is_hub_id(model):
            raise LlmcError(f"no such model: {model}", hint="an artifact, a folder, a hub id or a known name")
        folder = hub.fetch(model, weights=False)
    return read_config(folder)


def manifest_of(path: Path) -> dict[str, Any]:
    """An artifact's manifest, as the program has it that runs here, and its size as artifact_bytes.

    Raises LlmcError for one that writes no texts.
    """
    with ArtifactFile.open(path) as file:
        targets = [parse_target(name) for name in file.targets] if file.n_programs > 1 else []
        program = next((number for number, target in enumerate(targets) if not missing(target)), 0)
        manifest = file.manifest(program)
    if manifest.get("embedding"):
        fact = "the model makes embeddings, and writes no texts: it has no decoding to measure"
        raise LlmcError(fact, place=str(path), hint="bench/encode.py measures embeddings")
    if manifest.get("classification"):
        raise LlmcError("the model gives texts labels, and writes none: it has no decoding to measure", place=str(path))
    return {**manifest, "artifact_bytes": path.stat().st_size}

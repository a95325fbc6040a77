"""Exported graphs on disk, so that compiling a model a second time needs no torch.

An entry is one .onnx file without the weights' values.  It carries everything that the graph depends on (the
configuration, the versions of the exporter's packages, the exporter's own text) and is used only if that is equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from llmc import __version__

KEY = "llmc.key"
NOWHERE = "weights"
TAKES_ROWS, IS_TURNED, DEEP = "llmc.takes_rows", "llmc.is_turned", "llmc.n_deep"
PACKAGES = ("torch", "transformers", "onnxscript", "onnx-ir", "onnx")
NO_MATTER = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Fields of a configuration that the graph, always float32, does not depend on."""

EXPORTERS = (
    "../graph/causal_mask.py",
    "classes.py",
    "config.py",
    "embedding.py",
    "empty_weights.py",
    "export/*.py",
    "graph_cache.py",
    "text_of_whole.py",
)
"""What graphs depend on."""


def exported_graph(
    fields: dict[str, Any], place: str, *, takes_rows: bool = False, is_turned: bool = False, n_deep: int = 0
) -> ir.Model:
    """`export_graph` of a configuration's fields, from the cache where it has them."""

    def export() -> ir.Model:
        # By name, since importing the exporter imports torch, which takes seconds.
        config = import_module("llmc.compiler.frontend.config").parse_config(fields, place)
        exporter = import_module("llmc.compiler.frontend.export")
        model: ir.Model = exporter.export_graph(config, takes_rows=takes_rows, is_turned=is_turned, n_deep=n_deep)
        return model

    asked = {TAKES_ROWS: takes_rows, IS_TURNED: is_turned, DEEP: n_deep}
    return cached(_key(fields | {name: value for name, value in asked.items() if value}), export)


def exported_tower(fields: dict[str, Any], tile: tuple[int, int, int], image_token: int, place: str) -> ir.Model:
    """`export_tower` of the fields of a whole model's configuration, likewise."""

    def export() -> ir.Model:
        config = import_module("llmc.compiler.frontend.config").parse_whole(fields, place)
        model: ir.Model = import_module("llmc.compiler.frontend.export.tower").export_tower(config, tile, image_token)
        return model

    return cached(_key({**fields, "llmc.tile": [*tile, image_token]}), export)


def exported_sized_tower(fields: dict[str, Any], image_token: int, place: str) -> ir.Model:
    """`export_sized_tower` of the same fields, likewise."""

    def export() -> ir.Model:
        config = import_module("llmc.compiler.frontend.config").parse_whole(fields, place)
        model: ir.Model = import_module("llmc.compiler.frontend.export.tower").export_sized_tower(config, image_token)
        return model

    return cached(_key({**fields, "llmc.any_size": image_token}), export)


def cached(key: str, export: Callable[[], ir.Model]) -> ir.Model:
    """What `export` gives, from the cache where it has something that was made from the same."""
    file = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.onnx"
    model = _load(file, key)
    if model is None:
        model = export()
        proto = _proto(model, key)
        _save(proto, file)
        model = _model(proto, key) or model  # as later ones find it: ONNX keeps attributes in 32 bits
    return model


def cache_folder() -> Path:
    """$LLMC_CACHE/graphs, or else graphs in the user's cache folder for llmc."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLMC_CACHE") or Path(cache) / "llmc") / "graphs"


def _key(fields: dict[str, Any]) -> str:
    here = Path(__file__).parent
    texts = (file.read_bytes() for name in EXPORTERS for file in sorted(here.glob(name)))
    return json.dumps(
        {
            "config": {name: value for name, value in fields.items() if name not in NO_MATTER},
            "versions": {"llmc": __version__, **{name: metadata.version(name) for name in PACKAGES}},
            "exporter": [hashlib.sha256(text).hexdigest() for text in texts],
        },
        sort_keys=True,
    )


def _proto(model: ir.Model, key: str) -> onnx.ModelProto:
    """The entry that says what the graph is and what it was made from, of weights their shapes alone."""
    unread = [value for value in model.graph.initializers.values() if value.const_value is None]
    try:
        for value in unread:
            value.const_value = _promise(value)
        model.metadata_props[KEY] = key
        return ir.to_proto(model)
    finally:
        del model.metadata_props[KEY]
        for value in unread:
            value.const_value = None


def _save(proto: onnx.ModelProto, file: Path) -> None:
    """Write the entry whole or not at all; a cache that cannot be written is no error."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(proto, temporary)
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _promise(value: ir.Value) -> ir.ExternalTensor:
    """A tensor that lies in a file which nobody reads: how ONNX writes down a weight without its values."""
    assert value.shape is not None
    return ir.ExternalTensor(NOWHERE, 0, 0, ir.DataType.FLOAT, shape=ir.Shape(value.shape), name=value.name or "")


def _load(file: Path, key: str) -> ir.Model | None:
    try:
        return _model(onnx.load(file, load_external_data=False), key)
    except Exception:  # not there, or half written by a disk that was full: export again
        return None


def _model(proto: onnx.ModelProto, key: str) -> ir.Model | None:
    """The graph of an entry; None if it was made from something else."""
    model = ir.from_proto(proto)
    if model.metadata_props.pop(KEY, None) != key:
        return None
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model

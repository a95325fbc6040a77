"""Checkpoints that were quantised: what config.json says of it, and the numbers that their codes stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmc.compiler.frontend.chat import read_object
from llmc.compiler.frontend.packed import bitsandbytes, compressed, float8, gptq, mxfp4
from llmc.compiler.frontend.packed.packing import Packing
from llmc.compiler.frontend.packed.settings import Settings
from llmc.runtime.errors import LlmcError, shortened

READERS: Mapping[str, Callable[[Settings], Packing]] = {
    "awq": gptq.awq,
    "bitsandbytes": bitsandbytes.bitsandbytes,
    "compressed-tensors": compressed.compressed_tensors,
    "fbgemm_fp8": float8.fbgemm,
    "fp8": float8.fp8,
    "gptq": gptq.gptq,
    "mxfp4": mxfp4.mxfp4,
}
"""How a checkpoint is read, by what config.json calls the method."""
FIELDS = ("quantization_config", "compression_config")
GPTQ_FILE = "quantize_config.json"
"""Where GPTQ's settings lie in older checkpoints."""


def packing_in(folder: Path, fields: Mapping[str, Any]) -> Packing | None:
    """How the checkpoint of a folder keeps its weights; fields: config.json's."""
    packing, file = packing_of(fields, str(folder / "config.json")), folder / GPTQ_FILE
    if packing is not None or not file.is_file():
        return packing
    settings = read_object(file)
    return packing_of({FIELDS[0]: {"quant_method": "gptq", **settings}}, str(file))


def packing_of(fields: Mapping[str, Any], place: str) -> Packing | None:
    """How a checkpoint keeps its weights, as config.json's fields say; None: as they are.

    Raises LlmcError for what is not read, by name.
    """
    said = next((value for name in FIELDS if isinstance(value := fields.get(name), dict)), None)
    if said is None:
        text = fields.get("text_config")
        return packing_of(text, place) if isinstance(text, dict) else None
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        fact = f"the checkpoint is quantised by {shortened(method)}, which is not read"
        raise LlmcError(fact, place=place, hint=f"llmc reads {', '.join(READERS)}, and what is not quantised")
    return reader(Settings(str(method), said, place))


def without_packing(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's fields but for those that say how weights are kept."""
    kept = {name: value for name, value in fields.items() if name not in FIELDS}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = without_packing(text)
    return kept

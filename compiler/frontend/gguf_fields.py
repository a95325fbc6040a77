"""The numbers that a GGUF file says of its model, under the name of its architecture."""

from __future__ import annotations

import numpy as np

from llmc.compiler.frontend.gguf_file import GgufFile
from llmc.runtime.errors import LlmcError, shortened

BY_SOFTMAX, BY_SIGMOID = 1, 2
"""What a file calls the ways to make scores of a router's products."""


def count(file: GgufFile, name: str, default: int | None = None) -> int:
    """A number of things, 1 at least."""
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) is not int or value < 1:
        raise LlmcError(f"the file's {file.architecture}.{name} is no count", place=str(file.path))
    return value


def number(file: GgufFile, name: str, default: float, least: float = 1e-12) -> float:
    """A number, `least` at least."""
    value = file.fields.get(f"{file.architecture}.{name}", default)
    if type(value) not in (int, float) or not least <= value < 1e12:
        raise LlmcError(f"the file's {file.architecture}.{name} is no number", place=str(file.path))
    # float32 as it lies in the file; the shortest decimal of it is what its makers wrote
    return float(str(np.float32(value)))


def way_of_scores(file: GgufFile) -> int:
    """BY_SOFTMAX or BY_SIGMOID; 0: the file does not say."""
    way = file.fields.get(f"{file.architecture}.expert_gating_func", 0)
    if way not in (0, BY_SOFTMAX, BY_SIGMOID):
        raise LlmcError(f"experts chosen in the way {shortened(way)} are not read from GGUF", place=str(file.path))
    return int(way)

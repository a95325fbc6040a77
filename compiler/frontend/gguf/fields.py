"""The numbers that a GGUF file says of its model, under the name of its architecture."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc.compiler.frontend.gguf.file import GgufFile
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


def of_layers(file: GgufFile, name: str, n_layers: int) -> list[int]:
    """How many things each layer has, of a list or of one number for all."""
    value: Any = file.fields.get(f"{file.architecture}.{name}")
    each: list[int] = list(value) if isinstance(value, list) else [value] * n_layers
    if len(each) != n_layers or not all(type(one) is int and one >= 0 for one in each):
        raise LlmcError(f"the file's {file.architecture}.{name} is no list of its layers", place=str(file.path))
    return each


def count_of_layers(file: GgufFile, name: str, default: int | None = None) -> int:
    """A number of things; where the file says how many each layer has, those of all that have any."""
    said = file.fields.get(f"{file.architecture}.{name}")
    if not isinstance(said, list):
        return count(file, name, default)
    different = {each for each in said if each != 0}
    if len(different) != 1 or not isinstance(found := different.pop(), int) or found < 0:
        raise LlmcError(f"the file's {file.architecture}.{name} is no count", place=str(file.path))
    return found


def way_of_scores(file: GgufFile) -> int:
    """BY_SOFTMAX or BY_SIGMOID; 0: the file does not say."""
    way = file.fields.get(f"{file.architecture}.expert_gating_func", 0)
    if way not in (0, BY_SOFTMAX, BY_SIGMOID):
        raise LlmcError(f"experts chosen in the way {shortened(way)} are not read from GGUF", place=str(file.path))
    return int(way)

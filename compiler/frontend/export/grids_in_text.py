"""The same as rows_in_text.py of a model that is told how many lines and columns a picture's rows have.

Its rows stand in the text in place of tokens, and either that is all, or its positions have three directions: those of
a text, but for a picture that begins at b, whose rows have b, b + line and b + column; what is behind it goes on behind
the furthest of them.  That is not taken from a model's name: its own code is run with pictures of several shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from llmc.compiler.frontend.export.deep_rows import DEEP, FEATURES, WHERE, check_deep
from llmc.compiler.frontend.export.rows_in_text import (
    N_BEFORE,
    N_BEHIND,
    POSITIONS,
    SAID,
    Recorded,
    differing,
    refusal,
    same,
    text_part,
)
from llmc.runtime.errors import LlmcError

GRIDS = "image_grid_thw"
"""transformers' name for what says how many patches there are: of time, lines and columns."""
N_DEEP = 1
"""Layers that rows are tried to go into."""
TRIED = (((2, 3),), ((1, 4), (3, 2), (1, 1)))
"""Lines and columns of rows, of the pictures of a text."""


class Taken(NamedTuple):
    """How a text part takes pictures: whether positions have three directions, and whether rows go into later layers
    too, behind the first ones."""

    is_turned: bool
    is_deep: bool


def check_grids(model: PreTrainedModel, image_token: int, merge: int) -> Taken:
    """How the text part takes pictures.  Refuses a model whose text part needs more of a picture than such rows, or
    counts positions otherwise.

    merge: patches along a side of what becomes one row.  Leaves the model as it was.  Raises LlmcError with a fact
    alone.
    """
    found = {with_grids(model, image_token, merge, list(grids)) for grids in TRIED}
    if len(found) > 1:
        raise LlmcError(SAID[POSITIONS])
    return found.pop()


def with_grids(model: PreTrainedModel, image_token: int, merge: int, grids: list[tuple[int, int]]) -> Taken:
    """The same of a text with pictures of these lines and columns."""
    text = text_part(model)
    size = model.get_input_embeddings().weight.shape[-1]
    made = tuple(torch.randn(height * width, size) for height, width in grids)
    deep = [tuple(torch.randn(rows.shape) for rows in made) for _ in range(N_DEEP)]
    words = [token for token in range(N_BEFORE + N_BEHIND + 1) if token != image_token]
    before, behind = words[:N_BEFORE], words[N_BEFORE : N_BEFORE + N_BEHIND]
    ids = torch.tensor([[token for rows in made for token in (*before, *[image_token] * len(rows), *behind)]])
    patches = torch.tensor([[1, merge * height, merge * width] for height, width in grids])
    with torch.no_grad(), Recorded(model, text, size) as recorded:
        with_pictures = recorded.given(ids, image_token, made, {FEATURES: deep}, **{GRIDS: patches})
        without = recorded.given(ids, image_token, None)
    is_turned, told = False, {WHERE: ids == image_token, DEEP: [torch.cat(of_layer) for of_layer in deep]}
    names = differing(with_pictures, without, ids == image_token, torch.cat(made))
    for name in names:
        if POSITIONS in name and same(with_pictures.get(name), positions_of(ids[0] == image_token, grids)[:, None]):
            is_turned = True
        elif name not in told or not same(with_pictures.get(name), told[name]):
            raise refusal(name)
    is_deep = DEEP in names
    if is_deep:
        with torch.no_grad():
            check_deep(text, told)
    return Taken(is_turned, is_deep)


def positions_of(is_row: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Positions int64 [3, S] of S tokens, of which some stand for the rows of pictures with these lines and columns.
    is_row: bool [S]."""
    begin, positions, left = 0, list[tuple[int, int, int]](), list(grids)
    while len(positions) < len(is_row):
        if not is_row[len(positions)]:
            positions.append((begin, begin, begin))
            begin += 1
            continue
        height, width = left.pop(0)
        positions += [(begin, begin + line, begin + column) for line in range(height) for column in range(width)]
        begin += max(height, width)
    return torch.tensor(positions).T

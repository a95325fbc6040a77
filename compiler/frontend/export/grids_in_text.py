"""The same as rows_in_text.py of a model that is told how many lines and columns a picture's rows have.

Its rows stand in the text in place of tokens, and either that is all, or its positions have three directions: those of
a text, but for a picture that begins at b, whose rows have b, b + line and b + column; what is behind it goes on behind
the furthest of them.  That is not taken from a model's name: its own code is run with pictures of several shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

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
TRIED = (((2, 3),), ((1, 4), (3, 2), (1, 1)))
"""Lines and columns of rows, of the pictures of a text."""


def check_grids(model: PreTrainedModel, image_token: int, merge: int) -> bool:
    """Whether positions have three directions.  Refuses a model whose text part needs more of a picture than rows, or
    counts positions otherwise.

    merge: patches along a side of what becomes one row.  Leaves the model as it was.  Raises LlmcError with a fact
    alone.
    """
    found = {with_grids(model, image_token, merge, list(grids)) for grids in TRIED}
    if len(found) > 1:
        raise LlmcError(SAID[POSITIONS])
    return found.pop()


def with_grids(model: PreTrainedModel, image_token: int, merge: int, grids: list[tuple[int, int]]) -> bool:
    """The same of a text with pictures of these lines and columns."""
    text = text_part(model)
    size = model.get_input_embeddings().weight.shape[-1]
    made = tuple(torch.randn(height * width, size) for height, width in grids)
    words = [token for token in range(N_BEFORE + N_BEHIND + 1) if token != image_token]
    before, behind = words[:N_BEFORE], words[N_BEFORE : N_BEFORE + N_BEHIND]
    ids = torch.tensor([[token for rows in made for token in (*before, *[image_token] * len(rows), *behind)]])
    patches = torch.tensor([[1, merge * height, merge * width] for height, width in grids])
    with torch.no_grad(), Recorded(model, text, size) as recorded:
        with_pictures = recorded.given(ids, image_token, made, **{GRIDS: patches})
        without = recorded.given(ids, image_token, None)
    is_turned = False
    for name in differing(with_pictures, without, ids == image_token, torch.cat(made)):
        if POSITIONS in name and same(with_pictures.get(name), positions_of(ids[0] == image_token, grids)[:, None]):
            is_turned = True
        else:
            raise refusal(name)
    return is_turned


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

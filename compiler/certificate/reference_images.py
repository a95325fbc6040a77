"""What transformers makes of a tile of a picture, or of a whole one: the rows that stand in the text's embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, PreTrainedModel

from llmc.compiler.frontend.as_torch import TORCH_DTYPES, lend
from llmc.compiler.frontend.config import parse_whole
from llmc.compiler.frontend.empty_weights import empty_weights
from llmc.compiler.frontend.export.rows_in_text import text_part
from llmc.compiler.frontend.export.sized_tower import rows_of_picture
from llmc.compiler.frontend.export.tower import FeaturesOfTile
from llmc.compiler.frontend.quiet import quiet

if TYPE_CHECKING:
    from llmc.compiler.frontend import SourceModel
    from llmc.runtime.given import Example

Floats = NDArray[np.float32]


def reference_rows(source: SourceModel, example: Example, dtype: str) -> Floats:
    """The rows of an example picture as float32 [n, d], computed in `dtype`: "f32" or "bf16"."""
    assert source.images is not None
    tower = source.images.tower
    config = parse_whole(dict(source.images.fields), source.name)
    with quiet(), torch.inference_mode():
        with empty_weights():
            whole = AutoModelForImageTextToText.from_config(config, dtype=TORCH_DTYPES[dtype]).eval()
        lend(whole, tower.weights, dtype, keep=True)
        fill_up(whole)
        pixels = torch.from_numpy(example.pixels).to(TORCH_DTYPES[dtype])
        made = (
            FeaturesOfTile(whole, tower.tile).real(pixels)
            if example.grid is None
            else rows_of_picture(whole, pixels, example.grid)
        )
    return np.asarray(made.float().numpy())


def fill_up(whole: PreTrainedModel) -> None:
    """Give zeros to what no row depends on, and yet is run: layers behind the one whose states are taken."""
    texts = {id(parameter) for parameter in text_part(whole).parameters()}
    for module in whole.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and id(parameter) not in texts:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)

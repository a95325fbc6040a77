"""Whether a model's text part takes a picture's rows as it takes the embeddings of tokens, and nothing else of it.

The whole model's own code is run, but for its text part and for the tower: once with pictures and once without.  All
that the text part is given has to be the same both times, but for its embeddings, where pictures' rows stand in place
of their tokens, in order; and for masks, which may let a picture's rows see those of it that are behind them.  So
other masks, positions in three directions, or features for deeper layers are found whoever makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from llmc.runtime.errors import LlmcError

TYPES = ("token_type_ids", "mm_token_type_ids")
"""What transformers calls an input that says which tokens are a picture's."""
EMBEDDINGS = "inputs_embeds"
MASKS, POSITIONS = "mask", "position"
SAID = {
    MASKS: "what tokens see where there is a picture is not what is before them and, of a picture, the rest of it",
    POSITIONS: "a picture's rows have positions of their own",
}
"""What follows where an argument of the text part, by a part of its name, depends on the picture."""
NEEDS = "its text part takes {} of a picture"
N_BEFORE, N_BEHIND = 3, 2
"""Tokens of the text around each picture."""
WINDOW = "sliding_window"
SHORT_WINDOW = 2
"""Tokens of a window that is shorter than a picture, so that a mask shows which of the two ends what is seen."""


class Reached(Exception):
    """What the text part was given."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


def check_rows(model: PreTrainedModel, made: Any, image_token: int) -> bool:
    """Whether a picture's rows see each other, those that are behind them too.  Refuses a model whose text part needs
    more of a picture than that and rows in its embeddings.

    made: what the tower gives, without values: a tensor, or several; its last axis is a row.  Leaves the model as it
    was.  Raises LlmcError with a fact alone.
    """
    if not with_pictures(model, made, image_token, 1):
        return False
    with short_window(model):
        return with_pictures(model, made, image_token, 2)


@contextmanager
def short_window(model: PreTrainedModel) -> Iterator[None]:
    """Where the model's text part has a window, that is a few tokens long meanwhile."""
    config = model.config.get_text_config()
    before = getattr(config, WINDOW, None)
    if before:
        setattr(config, WINDOW, SHORT_WINDOW)
    try:
        yield
    finally:
        if before:
            setattr(config, WINDOW, before)


def with_pictures(model: PreTrainedModel, made: Any, image_token: int, n_pictures: int) -> bool:
    """The same of a text with so many pictures, of one tile each."""
    if n_pictures > 1:
        made = tree_map(lambda rows: torch.cat([rows] * n_pictures), made)
    text = text_part(model)
    n_rows = sum(rows.shape[:-1].numel() for rows in tree_leaves(made))
    size = tree_leaves(made)[0].shape[-1]
    rows, like = tree_flatten(made)
    real = [torch.randn(tuple(part.shape)) for part in rows]
    words = [token for token in range(N_BEFORE + N_BEHIND + 1) if token != image_token]
    before, behind = words[:N_BEFORE], words[N_BEFORE : N_BEFORE + N_BEHIND]
    ids = torch.tensor([[*before, *[image_token] * (n_rows // n_pictures), *behind] * n_pictures])
    with torch.no_grad(), Recorded(model, text, size) as recorded:
        with_picture = recorded.given(ids, image_token, tree_unflatten(real, like))
        without = recorded.given(ids, image_token, None)
    of_text = torch.cat([part.reshape(-1, size) for part in real])
    seen_ahead = False
    for name in differing(with_picture, without, ids == image_token, of_text):
        if MASKS in name and same(with_picture.get(name), sees_ahead(without.get(name), ids[0] == image_token)):
            seen_ahead = True
        else:
            raise refusal(name)
    return seen_ahead


def differing(
    with_pictures: dict[str, Any], without: dict[str, Any], is_image: torch.Tensor, rows: torch.Tensor
) -> list[str]:
    """Which arguments of the text part depend on the pictures, but for its embeddings, where their rows [n, d] are.
    is_image: bool [1, S].  Raises LlmcError where they are not."""
    expected = without[EMBEDDINGS].clone()
    expected[is_image] = rows
    found = with_pictures[EMBEDDINGS]
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise LlmcError("a picture's rows do not stand in its text in place of tokens, in their order")
    names = sorted({*with_pictures, *without} - {EMBEDDINGS})
    return [name for name in names if not same(with_pictures.get(name), without.get(name))]


def refusal(name: str) -> LlmcError:
    """The error that says of an argument of the text part that it depends on pictures."""
    return LlmcError(next((why for part, why in SAID.items() if part in name), NEEDS.format(name)))


def sees_ahead(masks: Any, is_image: torch.Tensor) -> Any:
    """What masks bool [1, 1, S, S] of a text without pictures become where each picture's tokens see the rest of it.

    is_image: bool [S].
    """
    picture = numbered(is_image)
    ahead = (picture[:, None] == picture) & is_image & torch.ones(len(picture), len(picture)).triu(1).bool()
    return tree_map(lambda mask: mask | ahead if isinstance(mask, torch.Tensor) else mask, masks)


def numbered(is_image: torch.Tensor) -> torch.Tensor:
    """For each token the number of its picture, counted from 1; 0 for one of none.  bool […, S] -> int64 […, S].

    Tokens of pictures that are one behind the other are one picture's.
    """
    begins = is_image & ~torch.cat([torch.zeros_like(is_image[..., :1]), is_image[..., :-1]], -1)
    return torch.where(is_image, begins.cumsum(-1), 0)


def text_part(model: PreTrainedModel) -> torch.nn.Module:
    """The module that is given the embeddings."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        raise LlmcError("transformers does not say which part of it is the text's")
    found: torch.nn.Module = decoder
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two arguments say the same."""
    left, right = tree_flatten(a), tree_flatten(b)
    if left[1] != right[1]:
        return False
    for x, y in zip(left[0], right[0], strict=True):
        are_tensors = isinstance(x, torch.Tensor), isinstance(y, torch.Tensor)
        if not (torch.equal(x, y) if all(are_tensors) else not any(are_tensors) and bool(x == y)):
            return False
    return True


class Recorded:
    """Within it, the model's text part says what it is given, and embeddings are of no weight.  size: of a row."""

    def __init__(self, model: PreTrainedModel, text: torch.nn.Module, size: int) -> None:
        self.model, self.text, self.size = model, text, size
        self.table = model.get_input_embeddings()
        self.inner = next(
            (module for module in model.modules() if module is not model and hasattr(module, "get_image_features")),
            model,
        )

    def __enter__(self) -> Recorded:
        self.text.forward = self.reached
        self.table.forward = self.embedded
        return self

    def __exit__(self, *_: object) -> None:
        for module, name in ((self.text, "forward"), (self.table, "forward"), (self.inner, "get_image_features")):
            module.__dict__.pop(name, None)

    def reached(self, *arguments: Any, **options: Any) -> None:
        names = list(signature(type(self.text).forward).parameters)[1:]
        raise Reached({**dict(zip(names, arguments, strict=False)), **options})

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids[..., None] + 1.0).expand(*ids.shape, self.size).clone()

    def given(
        self, ids: torch.Tensor, image_token: int, made: Any, besides: Any = None, **told: torch.Tensor
    ) -> dict[str, Any]:
        """What the text part is given for token ids [1, S].  made: the tower's rows; None: without a picture.
        besides: what else the tower gives, by name.  told: of pictures besides."""
        features = {"pooler_output": made, **(besides or {})}
        self.inner.__dict__["get_image_features"] = lambda *_, **__: ModelOutput(**features)
        known = signature(self.model.forward).parameters
        is_image = (ids == image_token).long() * (made is not None)
        types = {name: is_image for name in TYPES if name in known}
        pixels = {} if made is None else {"pixel_values": torch.ones(1, 1)}
        try:
            self.model(input_ids=ids, use_cache=False, **types, **pixels, **told)
        except Reached as reached:
            return {name: value for name, value in reached.given.items() if value is not None}
        except AttributeError as error:  # of what the tower gives besides rows
            if made is None or hasattr(ModelOutput, error.name or ""):
                raise
            raise LlmcError(NEEDS.format(error.name)) from error
        raise LlmcError("its text part is not reached")

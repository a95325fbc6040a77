"""Pictures in a prompt: each is prepared, made into rows of embeddings by the model's tower, and kept.

A text has a mark for each picture, which is one token.  In its place stand the picture's own tokens, as the model's
processor makes them of that picture alone; those of them that stand for rows are the ids that the runtime gives to rows
which it keeps.  The same picture is kept once: a prompt that has it again begins alike, and what has been read of it is
found.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from llmc.runtime.errors import LlmcError
from llmc.runtime.pictures import pictures_of
from llmc.runtime.processor import Prepared, Processor, Section
from llmc.runtime.seams import joined, pieces

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.given import Given
    from llmc.runtime.pictures import Picture
    from llmc.runtime.prompt_cache import PromptCache

MOST_KEPT_BYTES = 1 << 29
"""Of the rows of pictures that are kept for prompts to come; of those used last."""
RECOMPILE = "compile the model again with this llmc"


class Seen(NamedTuple):
    """A picture that has become rows, which are there as long as this is.  ids: in its place in a prompt."""

    ids: tuple[int, ...]
    rows: tuple[Given, ...]

    @property
    def n_rows(self) -> int:
        return sum(len(each.ids) for each in self.rows)


class Pictured(NamedTuple):
    """A prompt with pictures.  seen: to be held as long as it may still be read.  seconds: until the pictures were."""

    ids: tuple[int, ...]
    seen: tuple[Seen, ...] = ()
    seconds: float = 0.0


def checked_with(check: Callable[[int], None], others: int, n: int) -> None:
    """Check a picture's tokens beside others'."""
    check(others + n)


def at_once(work: Callable[[], Given]) -> Given:
    return work()


def refuse_cache(cache: PromptCache | None) -> None:
    """Raise LlmcError where a prompt with pictures is to be kept in a file."""
    if cache is not None:
        raise LlmcError(
            "a prompt with pictures is not kept in a file", place=str(cache.path), hint="leave the cache out"
        )


def images_of(model: Model, section: bytes | None) -> Images:
    """section: "processor", None where there is none.  Raises LlmcError: the model takes no pictures."""
    if section is None or not model.takes_images or not model.has_tokenizer:
        hint = "compile it with --images, if it is a model that does"
        raise LlmcError("the model takes no pictures", place=str(model.path), hint=hint)
    return Images(model, section, model.tokenizer_json)


class Images:
    """The pictures of a model, for any threads; one at a time is looked at.

    run: calls what runs the tower, where that is not to be done on whatever thread asks.
    """

    def __init__(self, model: Model, section: bytes, tokenizer_json: str) -> None:
        """section, tokenizer_json: the artifact's.  Raises LlmcError: they are damaged."""
        self.run: Callable[[Callable[[], Given]], Given] = at_once
        self._model, self._tokenizer_json = model, tokenizer_json
        self._row_bytes = 4 * model.info.n_row
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Seen] = OrderedDict()  # the one used last at the end
        self._n_kept = 0  # rows
        try:
            self._section = Section.read(section)
        except ValueError as error:
            fact = f"the artifact's processor is not what was written: {error}"
            raise LlmcError(fact, place=str(model.path), hint=RECOMPILE) from None

    @property
    def token(self) -> int:
        """The id that stands for a picture in a text's tokens, once."""
        return self._section.mark

    @cached_property
    def mark(self) -> str:
        """What stands for a picture in a text."""
        return str(self._model.tokenizer.id_to_token(self.token))

    @cached_property
    def processor(self) -> Processor:
        """Raises LlmcError: transformers cannot make it; ModuleNotFoundError: transformers or Pillow is not there."""
        return Processor(self._section, self._tokenizer_json, str(self._model.path))

    def read(self, prompt: str | Iterable[int], given: Sequence[Any]) -> Pictured:
        """A prompt with its pictures (see pictures.Given).  A text without marks for them has them before it, a line
        each.  Raises LlmcError; ModuleNotFoundError: transformers or Pillow is not there."""
        pictures = pictures_of(given)
        if isinstance(prompt, str):
            mark = self.mark
            ids = self._model.encode(prompt if mark in prompt else f"{mark}\n" * len(pictures) + prompt)
        else:
            ids = self._model.check_ids(prompt).tolist()
        return self.prompt(ids, pictures)

    def check_number(self, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
        """Raise LlmcError where a text's tokens have not as many places for pictures as there are."""
        n_places, n = list(ids).count(self.token), len(pictures)
        if n_places != n:
            places = f"{n_places} place{'s' if n_places != 1 else ''} for pictures ({self.mark})"
            fact = f"the prompt has {places}, and {n or 'none'} {'are' if n > 1 else 'is'} given"
            raise LlmcError(fact, place=str(self._model.path))

    def count(self, ids: Sequence[int], pictures: Sequence[Picture]) -> int:
        """Tokens of a text's prompt with its pictures, which the model does not read for it.  Raises as `prompt`."""
        self.check_number(ids, pictures)
        seen = [self._known(picture) or self._prepared(picture).ids for picture in pictures]
        return len(self._whole(ids, seen))

    def prompt(
        self, ids: Sequence[int], pictures: Sequence[Picture], check: Callable[[int], None] | None = None
    ) -> Pictured:
        """A text's tokens with the pictures in their places, `token` each.

        check: raises where a prompt has too many tokens, of which it is told as soon as they are known; by default as
        Model.check_length.  Raises LlmcError.
        """
        start = perf_counter()
        self.check_number(ids, pictures)
        if not pictures:  # of texts alone a server asks this beside a step, for which it must not wait
            return Pictured(tuple(ids))
        check, seen, least = check or self._model.check_length, list[Seen](), max(self._model.info.n_tile_rows, 1)
        n = len(ids) + (least - 1) * len(pictures)
        check(n)
        for picture in pictures:
            with self._lock:
                seen.append(self._seen(picture, partial(checked_with, check, n - least)))
            n += len(seen[-1].ids) - least
            check(n)
        whole = self._whole(ids, [each.ids for each in seen])
        return Pictured(tuple(whole), tuple(seen), perf_counter() - start)

    def _whole(self, ids: Sequence[int], seen: Iterable[Sequence[int]]) -> list[int]:
        """A text's tokens with the pictures' own in their places."""
        return joined(self._model.tokenizer, pieces(ids, self.token, seen), self._model.info.n_ids)

    def _seen(self, picture: Picture, check: Callable[[int], None]) -> Seen:
        """The picture's rows: those that are kept, or new ones.  check: told of its tokens before it is read."""
        digest = picture.digest()
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        prepared = self._prepared(picture)
        check(len(prepared.ids))
        seen = self._made(prepared)
        self._keep(digest, seen)
        return seen

    def _known(self, picture: Picture) -> tuple[int, ...] | None:
        with self._lock:
            seen = self._kept.get(picture.digest())
        return seen.ids if seen else None

    def _prepared(self, picture: Picture) -> Prepared:
        try:
            return self.processor(picture.decode())
        except LlmcError as error:
            raise LlmcError(error.fact, place=picture.place or error.place, hint=error.hint) from error

    def _made(self, prepared: Prepared) -> Seen:
        """Run the tower on each tile, or on the whole picture."""
        looks = [partial(self._model.image, tile) for tile in prepared.tiles if prepared.grid is None]
        if prepared.grid is not None:
            looks = [partial(self._model.picture, prepared.tiles, prepared.grid)]
        rows = tuple(map(self.run, looks))
        numbers = [number for each in rows for number in each.ids]
        token = self._section.image_token
        n_places = prepared.ids.count(token)
        if len(numbers) != n_places:
            fact = f"the model makes {len(numbers)} rows of the picture, and its processor has places for {n_places}"
            raise LlmcError(fact, place=str(self._model.path), hint=RECOMPILE)
        rest = iter(numbers)
        return Seen(tuple(next(rest) if each == token else each for each in prepared.ids), rows)

    def _keep(self, digest: bytes, seen: Seen) -> None:
        self._kept[digest] = seen
        self._n_kept += seen.n_rows
        while self._n_kept * self._row_bytes > MOST_KEPT_BYTES and len(self._kept) > 1:
            self._n_kept -= self._kept.popitem(last=False)[1].n_rows

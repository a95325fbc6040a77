"""The pictures of requests: looked at one request after the other, and read by the model between two steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from starlette.concurrency import run_in_threadpool

from llmc.runtime.errors import LlmcError
from llmc.runtime.images import Pictured
from llmc.runtime.serve.engine import Closing
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.generating import closing, queue_is_full
from llmc.runtime.serve.given_pictures import check_pictures
from llmc.runtime.serve.transport import MAX_BODY_BYTES, MAX_PICTURED_BYTES

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.pictures import Picture
    from llmc.runtime.serve.engine import Engine
    from llmc.runtime.serve.vocabulary import Vocabulary

T = TypeVar("T")


class Sight:
    """takes_pictures: whether the model does.  most_bytes: of a request's body."""

    def __init__(self, model: Model, engine: Engine, vocabulary: Vocabulary) -> None:
        self._model, self._engine, self._vocabulary = model, engine, vocabulary
        self.takes_pictures = model.takes_images
        self.most_bytes = MAX_PICTURED_BYTES if self.takes_pictures else MAX_BODY_BYTES
        self._turn, self._n_waiting = asyncio.Lock(), 0
        if self.takes_pictures:
            model.images.run = engine.call

    async def do(self, work: Callable[[], T], pictures: list[Picture], field: str) -> T:
        """What is done on another thread, in turn where there are pictures to look at.  field: of the request, that has
        them.  Raises ApiError."""
        if not pictures:
            return await run_in_threadpool(work)
        check_pictures(pictures, field)
        if self._n_waiting > self._engine.queue:
            raise queue_is_full()
        self._n_waiting += 1
        try:
            async with self._turn:
                return await run_in_threadpool(work)
        finally:
            self._n_waiting -= 1

    def prompt(self, ids: tuple[int, ...], pictures: list[Picture], field: str) -> Pictured:
        """A prompt's tokens with the pictures in their places.  Raises ApiError, also where the text has such a place
        and no picture."""
        if not self.takes_pictures:
            return Pictured(ids)

        def check(n: int) -> None:
            self._vocabulary.check_room(n, field)

        return told(lambda: self._model.images.prompt(ids, pictures, check), field)

    def count(self, ids: tuple[int, ...], pictures: list[Picture], field: str) -> int:
        """How many tokens that is."""
        if not self.takes_pictures:
            return len(ids)
        return told(lambda: self._model.images.count(ids, pictures), field)


def told(work: Callable[[], T], field: str) -> T:
    """What is done, its errors as a client is told of them."""
    try:
        return work()
    except LlmcError as error:
        fact = f"{error.fact}; {error.hint}" if error.hint else error.fact
        place = error.place if error.place and error.place.startswith(field) else field
        raise ApiError(500 if error.status else 400, f"'{place}': {fact}", param=place, code="invalid_value") from None
    except ModuleNotFoundError as error:
        fact = f"pictures need the Python package {error.name}, which the server does not have"
        raise ApiError(400, fact, param=field, code="unsupported_parameter") from None
    except Closing:
        raise closing() from None

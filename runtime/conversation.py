"""A conversation: messages in turns, written as the model's own chat template writes them, over one sequence.

    with llmc.load("model.so") as model, Conversation(model) as talk:
        for thought, answer in talk.ask("Who was Ada Lovelace?"):
            print(answer, end="", flush=True)

A turn feeds what the template has changed or added since the last one, and nothing else.  Of a model with states it
feeds what was added, or all, where anything was changed.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from llmc.runtime.adapters import restored
from llmc.runtime.embedding import check_writes
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY, Generation, History, How
from llmc.runtime.parse_json import parse_json
from llmc.runtime.pictures import pictures_of
from llmc.runtime.sequence import StrPath, as_ids, common
from llmc.runtime.serve.chat import ChatTemplate
from llmc.runtime.serve.contents import content_of, pictures_in
from llmc.runtime.serve.fields import ApiError
from llmc.runtime.serve.vocabulary import special_marks
from llmc.runtime.text import TextStream

if TYPE_CHECKING:
    from llmc.runtime.binding import Model
    from llmc.runtime.grammar import Constraint
    from llmc.runtime.images import Pictured
    from llmc.runtime.pictures import Given
    from llmc.runtime.serve.thoughts import Scanner
    from llmc.runtime.speculate import Speculation


class Piece(NamedTuple):
    """The next part of a turn: more of the thought before the answer, or more of the answer."""

    thought: str
    answer: str


class Conversation:
    """messages: so far, as {"role": …, "content": …}; may be changed between turns.  generation: the last turn's.
    What is said with pictures is a list of parts (see serve/contents.py).

    One answer at a time: whoever asks again, or begins anew, ends the one before, as if he had stopped listening.
    A context manager; `close` gives the sequence's pages back.
    """

    def __init__(
        self, model: Model, system: str | None = None, *, adapter: str | None = None, **variables: Any
    ) -> None:
        """system: a message before the first.  adapter: of the model's.  variables: of the template's own, as
        enable_thinking=False.

        Raises LlmcError: no chat template, or none that can be read; ModuleNotFoundError: no jinja2.
        """
        check_writes(model)
        self.model, self.variables = model, variables
        self._template = template_of(model)
        marks = self._template.marks
        self._shown = special_marks(model.tokenizer, marks.special if marks else (), model.info.n_vocab)
        self._sequence = model.sequence(adapter)
        self._fed: list[int] = []  # what is in the sequence
        self.generation: Generation | None = None
        self._saying: Generator[Piece] | None = None  # the last answer
        self._system: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        self.messages = list(self._system)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the pages back; closing twice is fine."""
        with suppress(LlmcError):  # another thread finds the sequence closed
            self._end_answer()
        self._sequence.close()

    def begin_anew(self) -> None:
        """Forget all messages but the system's."""
        self._end_answer()
        self.messages = list(self._system)

    def save(self, path: StrPath) -> None:
        """Write messages, and all that the model knows of them, to a file, for `restore`.  Raises LlmcError."""
        self._end_answer()
        if pictures_in(self.messages):
            fact, hint = "a conversation with pictures is not kept in a file", "begin another one first"
            raise LlmcError(fact, place=str(path), hint=hint)
        if self.messages == self._system:  # another conversation is not the file's business
            self._cut(0)
        self._sequence.save(path, json.dumps({"messages": self.messages}).encode())

    def restore(self, path: StrPath) -> None:
        """Go on with the conversation of a file, in place of this one; a message of the system's is that of the file.

        Raises LlmcError, and leaves all as it is: for a file that is no conversation, or another program's, or another
        adapter's.
        """
        sequence = restored(self.model, path, self._sequence.adapter)
        try:
            messages = read_messages(sequence.note, str(path))
            self._end_answer()
        except BaseException:
            sequence.close()
            raise
        self._sequence.close()
        self._sequence, self._fed, self.messages = sequence, sequence.tokens, messages
        self._system = messages[:1] if messages and messages[0]["role"] == "system" else []

    def ask(
        self,
        text: str,
        max_tokens: int | None = None,
        how: How = GREEDY,
        *,
        images: Sequence[Given] = (),
        constraint: Constraint | None = None,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """The answer to a message, in pieces as they come; max_tokens: None: as many as the context has room for.
        images: pictures before it, each a path, bytes, a picture of Pillow's, or uint8 [H, W, 3].

        What was said stays in `messages`, also when the caller stops early.  Raises LlmcError at once, and takes the
        message back, where the template refuses it or the context is full.
        """
        self._end_answer()
        self.messages.append({"role": "user", "content": content_of([*pictures_of(images), text])})
        try:
            return self.answer(max_tokens, how, constraint=constraint, speculation=speculation)
        except BaseException:
            self.messages.pop()
            raise

    def answer(
        self,
        max_tokens: int | None = None,
        how: How = GREEDY,
        *,
        constraint: Constraint | None = None,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """Like `ask`, but answers the last message, which stays if no answer can begin."""
        self._end_answer()
        try:
            prompt, scanner, pictured = self._written(constraint)
            n_same = common(as_ids(prompt[:-1]), as_ids(self._fed))  # one is fed in any case, to have logits
            n_same = self._cut(n_same)
            generation = Generation(
                self.model,
                prompt[n_same:],
                self.model.info.n_context if max_tokens is None else max_tokens,
                how,
                sequence=self._sequence,
                constraint=constraint,
                history=History(self._fed),
                speculation=speculation,
            )
        except BaseException:
            if speculation is not None:
                speculation.close()
            raise
        generation.pictured = pictured
        self.generation = generation
        self._saying = self._said(generation, prompt, scanner)
        return self._saying

    def _cut(self, n: int) -> int:
        """Sequence.cut, for the tokens that were fed too."""
        n = self._sequence.cut(n)
        del self._fed[n:]
        return n

    def _end_answer(self) -> None:
        """The last answer ends here: the sequence is the next one's.  Raises LlmcError where another thread says it."""
        try:
            if self._saying is not None:
                self._saying.close()
        except ValueError:  # of a generator that runs
            raise LlmcError("the last answer is still being said, by another thread") from None

    def _written(self, constraint: Constraint | None) -> tuple[list[int], Scanner | None, Pictured | None]:
        """-> (the messages as token ids, what tells a thought from the answer, if there may be one, their pictures)."""
        marks, scanner = self._template.marks, None
        try:
            text = self._template.render(self.messages, self.variables)
        except ApiError as error:
            raise LlmcError(error.message, place=str(self.model.path)) from None
        if marks is not None and not marks.is_over(text):
            if constraint is not None:  # it binds the whole text
                text += marks.answer_behind(text)
            else:
                scanner = marks.scanner(marks.is_open(text))
        ids, pictures = self.model.encode(text, special=False), pictures_in(self.messages)
        pictured = self.model.images.prompt(ids, pictures) if pictures or self.model.has_marks(text) else None
        return ids if pictured is None else [*pictured.ids], scanner, pictured

    def _said(self, generation: Generation, prompt: list[int], scanner: Scanner | None) -> Generator[Piece]:
        stream = TextStream(self.model.tokenizer, prompt)
        thought, answer, has_failed = "", "", False
        try:
            for piece in self._pieces(generation, stream, scanner):
                thought, answer = thought + piece.thought, answer + piece.answer
                yield piece
        except LlmcError:
            has_failed = True
            raise
        finally:
            generation.close()
            with suppress(LlmcError):  # the model, or the sequence, is closed: nothing is fed any more
                self._fed = [*prompt, *generation.tokens][: self._sequence.length]
            if has_failed:
                self.messages.pop()
            else:
                said = {"role": "assistant", "content": answer}
                self.messages.append(said | ({"reasoning_content": thought} if thought else {}))

    def _pieces(self, generation: Generation, stream: TextStream, scanner: Scanner | None) -> Iterator[Piece]:
        for token in generation:
            is_end = generation.stop == "eos"
            text = "" if is_end else stream.push(token) + self._shown.get(token, "")
            text += stream.flush() if generation.stop else ""
            piece = Piece(*scanner.push(text, generation.stop is not None)) if scanner else Piece("", text)
            if any(piece):
                yield piece


def read_messages(note: bytes, place: str) -> list[dict[str, Any]]:
    """The messages that Conversation.save wrote into a file's note.  Raises LlmcError."""
    try:
        said = parse_json(note)
        messages = [dict(message) for message in said["messages"]]
        is_good = all(isinstance(message["role"], str) and "content" in message for message in messages)
    except (KeyError, TypeError, ValueError):
        is_good = False
    if not is_good:
        raise LlmcError("this file keeps a text, and no conversation", place=place, hint="name another file")
    return messages


def template_of(model: Model) -> ChatTemplate:
    """The model's own.  Raises LlmcError."""
    place, chat = str(model.path), model.chat
    if chat is None or not model.has_tokenizer:
        lack = "chat template" if model.has_tokenizer else "tokenizer"
        raise LlmcError(f"the artifact has no {lack}", place=place, hint="llmc run continues texts, or token ids")
    try:
        return ChatTemplate(chat["template"], chat["tokens"], mark=lambda: model.images.mark)
    except ApiError as error:
        raise LlmcError(error.message, place=place) from None

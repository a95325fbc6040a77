"""An artifact as a Python object: `Model`.

Everything runs in the artifact's own C runtime: see runner.py; its sequences are in sequence.py.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Row
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from llmc.runtime import adapters, capi, given
from llmc.runtime.classification import Classification, Ranked, Text, classify, rank
from llmc.runtime.embedding import Embedding, Rows, check_writes, embed
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY, Generation, History, How
from llmc.runtime.given import Given
from llmc.runtime.grammar import Constraint, Grammar, Guide
from llmc.runtime.images import Images, images_of, refuse_cache
from llmc.runtime.prompt_cache import PromptCache
from llmc.runtime.runner import Logits, Runner
from llmc.runtime.sequence import Sequence, StrPath, restore
from llmc.runtime.speculate import Speculation
from llmc.runtime.text import TextStream, load_tokenizer, text_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llmc.runtime.pictures import Given as Picture


class Model(Runner):
    """A model ready to run.

        with llmc.load("model.so") as model:
            for piece in model.generate("Once upon a time"):
                print(piece, end="", flush=True)

    A context manager; `close` frees its memory and its threads.
    """

    # -- facts --------------------------------------------------------------

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the artifact says of itself, and of the program that runs."""
        return self._file.manifest(self.info.program)

    @cached_property
    def page_tokens(self) -> int:
        """Tokens of a page of the KV cache."""
        info = self.info
        return info.page_tokens or self._file.plan(info.program).header.page_tokens

    @cached_property
    def has_states(self) -> bool:
        """Whether its sequences have a recurrent state, which cannot go back to an earlier token: see Sequence.cut."""
        return self.info.slot_bytes > 0

    @cached_property
    def is_whole(self) -> bool:
        """Whether tokens attend to later ones too: then a text is one step, and nothing of it is kept."""
        return bool(self.info.is_whole)

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that a sequence may choose from."""
        return adapters.names_of(self)

    @property
    def target(self) -> str:
        """What the program that runs was compiled for; "" when the artifact does not say."""
        return str(self.manifest.get("target", {}).get("name", ""))

    @cached_property
    def embedding(self) -> Embedding | None:
        """How the model makes embeddings; None: it makes none."""
        return Embedding.of(self.manifest.get("embedding"), str(self.path))

    @cached_property
    def classification(self) -> Classification | None:
        """How the model gives texts labels; None: it gives none."""
        return Classification.of(self.manifest.get("classification"), str(self.path))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.  Raises LlmcError when the artifact carries none."""
        return load_tokenizer(self.tokenizer_json, str(self.path))

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as its own JSON file.  Raises LlmcError when the artifact carries none."""
        json = self._file.tokenizer_json()
        if json is None:
            hint = "give token ids: --tokens 1,2,3, or Model.tokens([1, 2, 3])"
            raise LlmcError("the artifact has no tokenizer", place=str(self.path), hint=hint)
        return json

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer" in self._file.sections

    @cached_property
    def chat(self) -> dict[str, Any] | None:
        """How messages become a prompt: "template" and "tokens"; None when the artifact does not say."""
        return self._file.chat()

    @property
    def takes_images(self) -> bool:
        """Whether it was compiled with --images."""
        return (any(self.info.tile) or self.info.patch > 0) and "processor" in self._file.sections

    @cached_property
    def images(self) -> Images:
        """What reads pictures; needs transformers and Pillow.  Raises LlmcError where the model takes none."""
        return images_of(self, self._file.processor())

    def has_marks(self, prompt: str | Iterable[int]) -> bool:
        """Whether a text has what stands for pictures, which then have to be given."""
        return isinstance(prompt, str) and self.takes_images and self.images.mark in prompt

    @cached_property
    def guide(self) -> Guide:
        """Follows grammars; needs llguidance."""
        return Guide(self)

    def is_eos(self, token: int) -> bool:
        """Whether this token ends a text."""
        with self.running() as (api, handle):
            return bool(api.is_eos(handle, capi.as_int32(token)))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, from the artifact's own vocabulary; they may be a part of a character."""
        data, size = c.c_void_p(), c.c_size_t()
        with self.running() as (api, handle):
            self._library.check(api.token_text(handle, capi.as_int32(token), data, size))
            return c.string_at(data, size.value) if data else b""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the special tokens that its template puts around a prompt."""
        try:
            tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, ValueError):  # half a surrogate pair, or bytes that were no UTF-8
            fact, hint = "the text is no valid Unicode", "give it in UTF-8"
            raise LlmcError(fact, place=str(self.path), hint=hint) from None
        bos = self.info.bos_token
        return tokens or ([bos] if special and bos >= 0 else [])

    def decode(self, tokens: Iterable[int], *, after: Iterable[int] = ()) -> str:
        """The text of token ids that follow those in `after`; special tokens have no text.

        Raises LlmcError for a number that is no token's.
        """
        stream = TextStream(self.tokenizer, self.check_ids(after).tolist())
        return "".join([*map(stream.push, self.check_ids(tokens).tolist()), stream.flush()])

    # -- generating -----------------------------------------------------------

    def generate(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        grammar: Grammar | None = None,
        speculate: int = 0,
        draft: Model | None = None,
        prompt_cache: StrPath | None = None,
        adapter: str | None = None,
        images: Row[Picture] = (),
    ) -> Iterator[str]:
        """The text that follows the prompt, in pieces as they come.

        It ends at an end token (unless ignored), after max_tokens, when the context is full, or when it is all that its
        grammar allows.

        temperature: 0 is greedy.  seed: None draws one.  top_k to logit_bias: see How.
        speculate: most tokens guessed in a step, by the draft model or else from what the text has said before; the
            text is the same without.
        prompt_cache: a file that keeps what the model has computed of the prompt: see PromptCache.
        adapter: one of `adapters`; None: the model alone.
        images: pictures, each a path, bytes, a picture of Pillow's, or uint8 [H, W, 3], in the places of the prompt's
            marks for them; where there are no marks, on lines before it.

        Raises LlmcError at once for a prompt that cannot be run, or a grammar that is not valid.
        """
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        how = How.choose(temperature, top_k, top_p, seed, min_p, *penalties, logit_bias)
        constraint = self.guide.constraint(grammar) if grammar else None
        guesses = Speculation.of(self, speculate, draft)
        asked: Any = {"constraint": constraint, "speculation": guesses, "cache": PromptCache.of(prompt_cache)}
        also: Any = {"ignore_eos": ignore_eos, "adapter": adapter, "images": images}
        stream = self.stream(prompt, max_tokens, how, **asked, **also)
        return text_pieces(stream, TextStream(self.tokenizer, stream.prompt))

    def tokens(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        ignore_eos: bool = False,
        speculate: int = 0,
        draft: Model | None = None,
        prompt_cache: StrPath | None = None,
        adapter: str | None = None,
        images: Row[Picture] = (),
    ) -> list[int]:
        """The ids of the tokens that follow the prompt, with the end token if there was one; see `generate`."""
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        how = How.choose(temperature, top_k, top_p, seed, min_p, *penalties, logit_bias)
        guesses = Speculation.of(self, speculate, draft)
        asked: Any = {"speculation": guesses, "cache": PromptCache.of(prompt_cache), "adapter": adapter}
        asked["images"] = images
        return list(self.stream(prompt, max_tokens, how, ignore_eos=ignore_eos, **asked))

    def stream(
        self,
        prompt: str | Iterable[int],
        max_tokens: int = 64,
        how: How = GREEDY,
        *,
        ignore_eos: bool = False,
        sequence: Sequence | None = None,
        constraint: Constraint | None = None,
        history: History | None = None,
        speculation: Speculation | None = None,
        cache: PromptCache | None = None,
        adapter: str | None = None,
        images: Row[Picture] = (),
    ) -> Generation:
        """Token ids one at a time, with timings.

        sequence: is continued; None: a new one.  history: the tokens in it, for penalties.
        constraint: where it leaves one token only, that is taken as a guess, unless `speculation` guesses otherwise.
        cache, adapter: for a new sequence: see PromptCache, and `adapters`.  images: see `generate`.
        """
        check_writes(self)
        pictured = self.images.read(prompt, images) if images or self.has_marks(prompt) else None
        if pictured is not None:
            refuse_cache(cache)
            prompt = pictured.ids
        ids = self.encode(prompt) if isinstance(prompt, str) else self.check_ids(prompt).tolist()
        if speculation is None and constraint is not None:
            speculation = Speculation.forced(self)
        adapters.number_of(self, adapter)
        asked = constraint, history, speculation, cache, adapter
        generation = Generation(self, ids, max_tokens, how, ignore_eos, sequence, *asked)
        generation.pictured = pictured
        return generation

    def embed(self, texts: Iterable[str | Iterable[int]], dimensions: int | None = None) -> Rows:
        """float32 [n, size]: the embeddings of texts, or of token ids.

        dimensions: take only that many, the first, brought to length 1 again.  Raises LlmcError for a model that makes
        no embeddings.
        """
        return embed(self, texts, dimensions)

    def classify(self, texts: Iterable[Text], *, raw: bool = False, truncate: bool = False) -> Rows:
        """float32 [n, labels]: the scores of texts, pairs of texts, or token ids; `classification` names the labels.

        raw: give logits.  truncate: cut what is longer than the model takes: the text, or the second of a pair.
        """
        return classify(self, texts, raw=raw, truncate=truncate)

    def rank(
        self, query: str, documents: Iterable[str], top: int | None = None, *, raw: bool = False, truncate: bool = False
    ) -> list[Ranked]:
        """Documents by how well they answer a query, the best first; `top`: only so many of them.

        For a reranker: a model that gives a pair of texts one label.  raw, truncate: see `classify`.
        """
        return rank(self, query, documents, top, raw=raw, truncate=truncate)

    def logits(self, tokens: Iterable[int], adapter: str | None = None) -> Logits:
        """float32 [n, n_vocab]: the logits after each of the n tokens."""
        with self.sequence(adapter) as sequence:
            return sequence.feed_for_logits(tokens)

    def sequence(self, adapter: str | None = None) -> Sequence:
        """A new, empty sequence; with an adapter, one of `adapters`, its tokens go through that."""
        number, out = adapters.number_of(self, adapter), capi.Handle()
        with self.running() as (api, handle):
            self._library.check(api.sequence_new(handle, out))
            return adapters.choose(Sequence(self, out), number)

    def rows(self, numbers: npt.ArrayLike, grid: tuple[int, int] | None = None) -> Given:
        """Keep float32 [n, n_row] rows, each of which may stand for a token in place of its embedding: `Given.ids` are
        fed as tokens are.  grid: how many lines of how many columns they are of a picture, where that matters to the
        model's positions.  Raises LlmcError for an artifact that takes none."""
        return given.rows(self, numbers, grid)

    def image(self, pixels: npt.ArrayLike) -> Given:
        """The rows that the model makes of a tile of a picture, float32 [channels, height, width] as the model's own
        processor gives it.  Raises LlmcError for an artifact that takes no pictures."""
        return given.image(self, pixels)

    def picture(self, patches: npt.ArrayLike, grid: tuple[int, int]) -> Given:
        """The rows that the model makes of a picture of any size: float32 [lines * columns, info.patch] patches as the
        model's own processor orders them.  grid: (lines, columns) of patches.  Raises LlmcError for an artifact that
        takes none, and for a picture that is larger than it was compiled for."""
        return given.picture(self, patches, grid)

    def restore(self, path: StrPath) -> Sequence:
        """The sequence that `Sequence.save` wrote at a path; it continues exactly as that one, bit for bit.

        Raises LlmcError for a file that is damaged or another program's, and where there is no room for its tokens.
        """
        return restore(self, path)

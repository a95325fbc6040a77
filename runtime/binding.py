"""An artifact as a Python object: `Model`; its sequences are in sequence.py.

Everything runs in the artifact's own C runtime; this module checks what it is given, keeps handles, and turns
failures into LlmcError.  Calls on one model are made one at a time, from any thread.
"""

from __future__ import annotations

import ctypes as c
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmc.runtime import adapters, capi
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.classification import Classification, Ranked, Text, classify, rank
from llmc.runtime.embedding import Embedding, Rows, check_writes, embed
from llmc.runtime.errors import LlmcError
from llmc.runtime.generation import GREEDY, Generation, History, How
from llmc.runtime.grammar import Constraint, Grammar, Guide
from llmc.runtime.info import Info
from llmc.runtime.profile import Phase, Profile
from llmc.runtime.prompt_cache import PromptCache
from llmc.runtime.sequence import NotCopied, Sequence, StrPath, restore, sample_many
from llmc.runtime.speculate import Speculation
from llmc.runtime.text import TextStream, load_tokenizer, text_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
LoadProgress = Callable[[int, int], None]
"""Called with (bytes copied, bytes in all)."""


class Model(NotCopied):
    """A model ready to run.

        with llmc.load("model.so") as model:
            for piece in model.generate("Once upon a time"):
                print(piece, end="", flush=True)

    A context manager; `close` frees its memory and its threads.
    """

    def __init__(
        self,
        file: ArtifactFile,
        threads: int,
        kv_tokens: int,
        device: capi.Device = capi.ANY,
        progress: LoadProgress | None = None,
        slots: int = 0,
    ) -> None:
        self.path = file.path
        self._file = file
        self._lock = threading.RLock()
        self._sequences: set[int] = set()  # handles, freed before the model whoever forgets them
        self._library = library = capi.Library.of(file)
        self._handle: int | None = None
        self._profile: Profile | None = None
        self._turn: c.Array[capi.AdvanceInput] = (capi.AdvanceInput * 1)()  # kept from call to call
        options, handle = capi.Options(c.sizeof(capi.Options)), capi.Handle()
        options.n_threads, options.kv_tokens = min(threads, 0x7FFFFFFF), min(kv_tokens, 0xFFFFFFFFFFFFFFFF)
        options.run_on, options.device = device
        options.n_slots = min(slots, 0xFFFFFFFF)
        try:
            with capi.reporting(options, progress):
                library.check(library.api.open(options, handle))
        except BaseException:
            library.release()
            raise
        self._handle = handle.value

    # -- life ---------------------------------------------------------------

    def close(self) -> None:
        """Free the model and all its sequences; closing twice is fine."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                for sequence in self._sequences:
                    self._library.api.sequence_free(sequence)
                self._sequences.clear()
                self._library.api.close(handle)
                self._library.release()
            self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if "_handle" in self.__dict__:  # absent when __init__ failed early
            self.close()

    # -- facts --------------------------------------------------------------

    @property
    def info(self) -> Info:
        """Sizes, threads, and the room in the KV cache as it is now."""
        raw = capi.Info(size=c.sizeof(capi.Info))
        with self.running() as (api, handle):
            self._library.check(api.info(handle, raw))
        return Info.of(raw)

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
        json = self._file.tokenizer_json()
        if json is None:
            hint = "give token ids: --tokens 1,2,3, or Model.tokens([1, 2, 3])"
            raise LlmcError("the artifact has no tokenizer", place=str(self.path), hint=hint)
        return load_tokenizer(json, str(self.path))

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer" in self._file.sections

    @cached_property
    def chat(self) -> dict[str, Any] | None:
        """How messages become a prompt: "template" and "tokens"; None when the artifact does not say."""
        return self._file.chat()

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
    ) -> Iterator[str]:
        """The text that follows the prompt, in pieces as they come.

        It ends at an end token (unless ignored), after max_tokens, when the context is full, or when it is all that its
        grammar allows.

        temperature: 0 is greedy.  seed: None draws one.  top_k to logit_bias: see How.
        speculate: most tokens guessed in a step, by the draft model or else from what the text has said before; the
            text is the same without.
        prompt_cache: a file that keeps what the model has computed of the prompt: see PromptCache.
        adapter: one of `adapters`; None: the model alone.

        Raises LlmcError at once for a prompt that cannot be run, or a grammar that is not valid.
        """
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        how = How.choose(temperature, top_k, top_p, seed, min_p, *penalties, logit_bias)
        constraint = self.guide.constraint(grammar) if grammar else None
        guesses = Speculation.of(self, speculate, draft)
        asked: Any = {"constraint": constraint, "speculation": guesses, "cache": PromptCache.of(prompt_cache)}
        stream = self.stream(prompt, max_tokens, how, ignore_eos=ignore_eos, adapter=adapter, **asked)
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
    ) -> list[int]:
        """The ids of the tokens that follow the prompt, with the end token if there was one; see `generate`."""
        penalties = repetition_penalty, presence_penalty, frequency_penalty
        how = How.choose(temperature, top_k, top_p, seed, min_p, *penalties, logit_bias)
        guesses = Speculation.of(self, speculate, draft)
        asked: Any = {"speculation": guesses, "cache": PromptCache.of(prompt_cache), "adapter": adapter}
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
    ) -> Generation:
        """Token ids one at a time, with timings.

        sequence: is continued; None: a new one.  history: the tokens in it, for penalties.
        constraint: where it leaves one token only, that is taken as a guess, unless `speculation` guesses otherwise.
        cache, adapter: for a new sequence: see PromptCache, and `adapters`.
        """
        check_writes(self)
        ids = self.encode(prompt) if isinstance(prompt, str) else self.check_ids(prompt).tolist()
        if speculation is None and constraint is not None:
            speculation = Speculation.forced(self)
        adapters.number_of(self, adapter)
        asked = constraint, history, speculation, cache, adapter
        return Generation(self, ids, max_tokens, how, ignore_eos, sequence, *asked)

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

    def restore(self, path: StrPath) -> Sequence:
        """The sequence that `Sequence.save` wrote at a path; it continues exactly as that one, bit for bit.

        Raises LlmcError for a file that is damaged or another program's, and where there is no room for its tokens.
        """
        return restore(self, path)

    def step(self, inputs: Iterable[tuple[Sequence, Iterable[int]]]) -> None:
        """Append tokens to several sequences at once; on an error nothing is appended to any."""
        self.run_step([(sequence, self.check_ids(tokens), None) for sequence, tokens in inputs])

    def sample(self, inputs: Iterable[tuple[Sequence, How]]) -> list[int]:
        """The next token of several sequences, as Sequence.sample chooses it; on a GPU at about the cost of one."""
        return sample_many(self, list(inputs))

    @cached_property
    def runs_ahead(self) -> bool:
        """Whether `advance` returns while its step still runs: on a GPU, by a runtime that can."""
        return capi.has(self._library.api, "advance") and self.info.device != "CPU"

    def check_hows(self, hows: Iterable[How]) -> None:
        """Raise LlmcError where something is asked for that the artifact's runtime cannot heed."""
        for how in [how for how in hows if not how.is_plain]:
            self.info.check_how(how, str(self.path))

    def advance(self, inputs: Iterable[tuple[Sequence, How]]) -> list[int]:
        """The next token of several sequences, as `sample` chooses it, appended to each as by `step`.

        On a GPU it returns the tokens while the step that appends them still runs; what is asked next waits only if it
        needs that step's results, and `Sequence.truncate`, which takes a token back, does not wait.  On an error
        nothing is appended to any.
        """
        listed = list(inputs)
        self.check_hows(how for _, how in listed)
        with self.running() as (api, handle):
            if self._profile is not None or not capi.has(api, "advance"):
                return self._sample_and_step(listed)
            n = len(listed)
            if len(self._turn) < n:
                self._turn = (capi.AdvanceInput * n)()
            turn = self._turn
            for entry, (sequence, how) in zip(turn, listed, strict=False):
                entry.sequence, entry.how = sequence.handle, capi.pointer_to(how)
            self.check(api.advance(handle, turn, n))
            return [entry.token for entry in turn[:n]]

    def _sample_and_step(self, inputs: list[tuple[Sequence, How]]) -> list[int]:
        """`advance` in two calls: for an artifact from before it, and so that a profile has the step alone."""
        tokens = self.sample(inputs)
        ids = np.array(tokens, dtype=np.int32)
        self.run_step([(sequence, ids[i : i + 1], None) for i, (sequence, _) in enumerate(inputs)])
        return tokens

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Record when each task of the steps made meanwhile begins and ends.

        Raises LlmcError when the artifact's runtime cannot tell.
        """
        with self.running() as (api, handle):
            capi.check_has(api, "profile", "measure its kernels", str(self.path))
            self._profile = profile = Profile()
            self.check(api.profile(handle, profile.memory))
        try:
            yield profile
        finally:
            self._profile = None
            with self.running() as (api, handle):
                self.check(api.profile(handle, None))

    # -- for Sequence ---------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[tuple[capi.Api, int]]:
        """The function table and the model's handle, for one caller at a time."""
        with self._lock:
            if self._handle is None:
                raise LlmcError("the model is closed", place=str(self.path))
            yield self._library.api, self._handle

    def run_step(self, inputs: list[tuple[Sequence, Ids, Logits | None]], phase: Phase | None = None) -> None:
        """One llmc_step; logits, where given, are float32 [n, n_vocab] and are filled.

        phase: what a profile calls the step; by default "decode" when no sequence gets more than one token.
        """
        raw = (capi.StepInput * len(inputs))()
        with self.running() as (api, handle):
            for entry, (sequence, ids, logits) in zip(raw, inputs, strict=True):
                entry.sequence, entry.tokens, entry.n_tokens = sequence.handle, ids.ctypes.data, len(ids)
                entry.logits = None if logits is None else logits.ctypes.data
            with self.recording([(sequence, ids) for sequence, ids, _ in inputs], phase):
                self.check(api.step(handle, raw, len(inputs)))

    @contextmanager
    def recording(self, inputs: Iterable[tuple[Sequence, Ids]], phase: Phase | None = None) -> Iterator[None]:
        """Around a step of the model that is `running`: for its profile, if somebody wants one."""
        if self._profile is None:
            yield
            return
        length = self._library.api.sequence_length
        with self._profile.step([(int(length(sequence.handle)), len(ids)) for sequence, ids in inputs], phase):
            yield

    def check(self, status: int) -> None:
        """Raise LlmcError for a status that is not LLMC_OK."""
        self._library.check(status)

    def check_ids(self, tokens: Iterable[int]) -> Ids:
        """int32 [n], contiguous.  Raises LlmcError naming the first token that is out of range."""
        return self.info.check_ids(tokens, str(self.path))

    def check_length(self, n_tokens: int) -> None:
        """Raise LlmcError when a sequence cannot hold so many tokens."""
        self.info.check_length(n_tokens, str(self.path))

    def adopt(self, handle: int) -> None:
        """Free this sequence when the model is closed, unless it is freed before."""
        self._sequences.add(handle)

    def release(self, handle: int) -> None:
        """Free a sequence now."""
        with self._lock:
            if handle in self._sequences:
                self._sequences.remove(handle)
                self._library.api.sequence_free(handle)

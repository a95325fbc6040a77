"""`serve`: the socket, the model, the event loop, and how they end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from llmc.runtime import capi, load
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.binding import Model
from llmc.runtime.errors import LlmcError
from llmc.runtime.runner import LoadProgress
from llmc.runtime.serve.app import Service
from llmc.runtime.serve.connections import Connection, Limits
from llmc.runtime.serve.engine import Engine
from llmc.runtime.serve.guesses import LIGHT_STEP
from llmc.runtime.serve.job import Said
from llmc.runtime.speculate import FORCED, check_vocabulary

LEAST_BATCH, WHOLE_BATCH = 8, 32
"""Texts in a step, by default: the least for a model that writes texts; and for one that reads them whole, more, so
that short texts fill a step."""
MEMORY_SHARE = 0.8
"""Share of a CPU's memory, beside the weights, that the KV cache may grow to by default."""
SLOTS_A_TEXT = 3
"""Slots of a model with states for each text of a step: for its own, for the one that guesses start from, and for a
text that has ended and is kept for others that begin with it."""
SECONDS_AFTER_GRACE = 2
"""For answers to reach their clients after the last text was ended."""
LISTEN_HINTS = {
    errno.EADDRINUSE: "stop what uses it, or give another --port; 0 takes a free one",
    errno.EADDRNOTAVAIL: "give an address of this machine, or --host 0.0.0.0 for all that it has",
    errno.EACCES: "ports below 1024 are the administrator's: give another --port",
}
"""What to do where the system refuses an address, by its error."""


@dataclass(frozen=True)
class Options:
    """The settings of a server; 0 and None are defaults.

    max_batch: most texts in a step.  queue: most texts that wait.  kv_tokens: tokens that the KV cache has room for.
    chunk: most tokens of a step in which texts go on, theirs and those of prompts beside them.
    speculate: tokens guessed for a text in a step; None: as many as a draft makes in a light step.
    draft: the artifact of a model that guesses.  prompt_cache: a folder that keeps ended texts over a restart.
    name: of the model, for clients.  grace: seconds that texts have to end after a signal.
    allow_origins: origins of web pages whose scripts may ask; "*": all.  limit_concurrency: most connections.
    timeout: seconds that a client may take to send a request, or leave its answer unread.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    threads: int = 0
    device: str | None = None
    max_batch: int = 0
    queue: int = 64
    kv_tokens: int = 0
    chunk: int = 0
    speculate: int | None = None
    draft: str | None = None
    prompt_cache: str | None = None
    name: str | None = None
    api_key: str | None = None
    grace: float = 5.0
    allow_origins: tuple[str, ...] = ()
    limit_concurrency: int = 512
    timeout: float = 60.0


def serve(
    artifact: str, options: Options, announce: Callable[[str, Model], None], progress: LoadProgress | None = None
) -> None:
    """Serve an artifact until SIGINT, SIGTERM or SIGHUP.

    announce: called with the address and the model once requests are answered.  Raises LlmcError: no such artifact,
    an address that cannot be had.
    """
    with listening(options.host, options.port) as listener, open_model(artifact, options, progress) as model:
        name_of(model, options)
        prepare(model)
        with open_draft(model, options) as draft:
            asyncio.run(run(model, draft, listener, options, announce))


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address; who connects waits until the model is there."""
    place = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise LlmcError(f"there is no address {host!r}: {error}", place="--host") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)  # of two servers that bound the port the second learns of it here
            listener.setblocking(False)
        except OSError as error:
            hint = LISTEN_HINTS.get(error.errno or 0)
            raise LlmcError(f"cannot listen: {error.strerror}", place=place, hint=hint) from None
        yield listener


def open_model(artifact: str, options: Options, progress: LoadProgress | None) -> Model:
    """With room for as many whole contexts as there are texts in a step, or what there is memory for."""

    def opened(kv_tokens: int) -> Model:
        device = options.device
        slots = SLOTS_A_TEXT * n_texts
        return load(
            artifact, threads=options.threads, kv_tokens=kv_tokens, device=device, progress=progress, slots=slots
        )

    with ArtifactFile.open(artifact) as file:
        manifest = file.manifest()
    n_context = int(manifest.get("model", {}).get("n_context") or 0)
    n_texts = batch_of(manifest, options)
    if options.kv_tokens:
        return opened(options.kv_tokens)
    while n_context and n_texts > 1:
        try:
            model = opened(n_texts * n_context)
        except LlmcError as error:
            if error.status != capi.NO_MEMORY:
                raise
            n_texts //= 2
            continue
        most = tokens_in_memory(model)
        if most is None or most >= n_texts * n_context:
            return model
        model.close()
        return opened(max(most, n_context))
    return opened(0)


def name_of(model: Model, options: Options) -> str:
    """The model's name for clients.  Raises LlmcError where an adapter has the same."""
    name = options.name or Path(model.path).stem
    if name in model.adapters:
        raise LlmcError(f"the model and an adapter of it are both named {name!r}", hint="give the model another --name")
    return name


def open_draft(model: Model, options: Options) -> AbstractContextManager[Model | None]:
    """With room for the texts that guesses are made at together."""
    if options.draft is None:
        return nullcontext()
    n_texts = min(LIGHT_STEP // 2, batch_of(model.manifest, options))
    kv_tokens = n_texts * model.info.n_context
    slots = SLOTS_A_TEXT * n_texts  # its own, and the copy in which it guesses
    draft = load(options.draft, threads=options.threads, kv_tokens=kv_tokens, device=options.device, slots=slots)
    try:
        check_vocabulary(draft, model)
    except LlmcError:
        draft.close()
        raise
    return draft


def prepare(model: Model) -> None:
    """Read what grammars and pictures need while nobody waits: learning a vocabulary of 128k takes 3 s, transformers a
    second or two, and the interpreter with them."""
    with suppress(LlmcError, ModuleNotFoundError):  # which is told to those who ask for a grammar
        if model.has_tokenizer and model.embedding is None and model.classification is None:
            _ = model.guide
    with suppress(LlmcError, ModuleNotFoundError):  # or show a picture
        if model.takes_images:
            _ = model.images.processor


def batch_of(manifest: Mapping[str, Any], options: Options) -> int:
    """Texts in a step: as many as decoding was compiled for, unless it is said."""
    made = manifest.get("embedding") or manifest.get("classification")
    least = WHOLE_BATCH if isinstance(made, dict) and made.get("whole") else LEAST_BATCH
    compiled_for = manifest.get("batch")
    sizes = [size for size in compiled_for if isinstance(size, int)] if isinstance(compiled_for, list) else []
    return options.max_batch or max([*sizes, least])


def tokens_in_memory(model: Model) -> int | None:
    """Room in the KV cache for which a CPU's memory is certain to suffice; None: it is not the CPU's."""
    info = model.info
    if info.device != "CPU" or not info.kv_bytes_per_token:
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    taken = info.weight_bytes + info.n_slots * info.slot_bytes
    return int(max(0, available - taken) * MEMORY_SHARE) // info.kv_bytes_per_token


class Server(uvicorn.Server):
    """uvicorn's, but for signals: `run` handles them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(
    model: Model,
    draft: Model | None,
    listener: socket.socket,
    options: Options,
    announce: Callable[[str, Model], None],
) -> None:
    """Serve until a signal comes; then texts have `grace` seconds to end."""
    loop = asyncio.get_running_loop()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # that a client has gone is no warning
    max_batch = batch_of(model.manifest, options)

    def post(news: list[Said]) -> None:
        loop.call_soon_threadsafe(deliver, news)

    most = options.speculate if options.speculate is not None else FORCED if draft is not None else 0
    given: Any = {"chunk": options.chunk, "speculate": most, "draft": draft, "prompt_cache": options.prompt_cache}
    engine = Engine(model, post, max_batch=max_batch, queue=options.queue, **given)
    service = Service(model, engine, name_of(model, options), options.api_key)
    limits = Limits(options.limit_concurrency, options.timeout)
    server = Server(config_of(service, limits, options))
    service.connections, service.most_connections = server.server_state.connections, limits.connections

    def leave() -> None:
        engine.drain(0 if server.should_exit else options.grace)  # the second time: now
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(number, leave)
    engine.start()
    loop.call_soon(announce, address_of(listener, options.host), model)
    try:
        await server.serve(sockets=[listener])
    finally:
        engine.drain(0)
        await asyncio.to_thread(engine.close)


def config_of(service: Service, limits: Limits, options: Options) -> uvicorn.Config:
    """How uvicorn serves it."""
    app = service.app()
    if options.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    return uvicorn.Config(
        app,
        http=partial(Connection, limits),  # type: ignore[arg-type]  # called as the class would be
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=ceil(options.timeout),  # in the 5 s that are usual clients forget connections too
        timeout_graceful_shutdown=int(options.grace) + SECONDS_AFTER_GRACE,
    )


def deliver(news: list[Said]) -> None:
    """On the event loop: to whoever waits."""
    for said in news:
        said.job.listen(said)


def address_of(listener: socket.socket, host: str) -> str:
    """As a client writes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"

"""`llmc serve`: an artifact behind HTTP."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from llmc.cli.opening import device_option, speculation_options
from llmc.cli.output import artifact_argument, in_bytes, installed, say, show_upload, threads_option

if TYPE_CHECKING:
    from llmc.runtime.binding import Model


def not_empty(key: str | None) -> str | None:
    """The key.  An empty one, as from a variable that is not set, is refused: it would let everybody in."""
    if key is not None and not key.strip():
        raise click.BadParameter("the key is empty")
    return key


def parse_origins(context: click.Context, option: click.Parameter, origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers write them, such as https://chat.example.com; or *."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise click.BadParameter(
                f"{origin!r} is no origin such as https://chat.example.com (no path, no slash behind)"
            )
    return origins


@click.command(short_help="Serve an artifact over HTTP.")
@artifact_argument
@click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="0.0.0.0: every interface.")
@click.option(
    "--port", metavar="PORT", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."
)
@threads_option
@device_option
@click.option(
    "--max-batch",
    metavar="N",
    type=click.IntRange(1),
    help="Most texts in a step.  [default: the largest batch the file was compiled for, at least 8; 32 where texts "
    "are read whole]",
)
@click.option(
    "--queue", metavar="N", type=click.IntRange(0), default=64, show_default=True, help="Most texts that wait."
)
@click.option(
    "--kv-tokens",
    metavar="N",
    type=click.IntRange(1),
    help="Room for the tokens of all texts.  [default: max-batch whole contexts, or what memory holds]",
)
@click.option(
    "--chunk",
    metavar="N",
    type=click.IntRange(2),
    help="Tokens of a step that reads prompts beside texts that go on.  [default: 32; on a GPU 256]",
)
@click.option(
    "--prompt-cache",
    metavar="DIR",
    type=click.Path(),
    help="Keep texts that have ended in DIR when the server ends, for prompts that begin alike when it is back.",
)
@speculation_options
@click.option("--name", metavar="NAME", help="Of the model, for clients.  [default: the file's]")
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="LLMC_API_KEY",
    callback=lambda _context, _option, key: not_empty(key),
    help="What clients have to send.  [default: $LLMC_API_KEY]",
)
@click.option(
    "--allow-origin",
    "allow_origins",
    metavar="ORIGIN",
    multiple=True,
    callback=parse_origins,
    help="Web pages whose scripts may ask (CORS), as https://chat.example.com, or * for all; several times.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    default=5.0,
    show_default=True,
    help="Texts may end for so long after Ctrl-C or SIGTERM.",
)
@click.option(
    "--limit-concurrency",
    metavar="N",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Most connections; those beyond are asked to come again.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 86400),
    default=60.0,
    show_default=True,
    help="A client is given up that takes so long to send a request, or to read on.",
)
def command(artifact: str, **options: Any) -> None:
    """Serve an artifact over HTTP, in the form of OpenAI's API and of Anthropic's.

    \b
    POST /v1/completions  POST /v1/chat/completions  GET /v1/models
    POST /v1/responses    POST /v1/messages (Anthropic)
    POST /tokenize        POST /detokenize
    GET /health           GET /metrics (Prometheus)

    Texts of all clients are generated together: a new one joins at the next step. The address is printed on standard
    output as soon as requests are answered. Ctrl-C, SIGTERM or a closed terminal ends the server, with exit code 0; a
    second one at once.
    """
    with installed("serving", "serve"):
        import jinja2  # noqa: F401
        import starlette  # noqa: F401

        from llmc.runtime.serve.server import Options, serve
    given = {name: value for name, value in options.items() if value is not None}
    serve(artifact, Options(**given), announce, show_upload if sys.stderr.isatty() else None)
    say("stopped")


def announce(address: str, model: Model) -> None:
    """The address on standard output, for people and scripts; the rest beside it."""
    said, info = f"{model.path.name} is served at {address}", model.info
    try:
        click.echo(said)
    except OSError as error:  # a full disk, or a pipe that nobody reads: clients can be served all the same
        say(f"{said}; standard output: {error.strerror}")
    threads = f", {info.n_threads} thread{'s' if info.n_threads != 1 else ''}" if info.device == "CPU" else ""
    room = f"room for {info.kv_tokens} tokens ({in_bytes(info.kv_tokens * info.kv_bytes_per_token)})"
    adapters = f"; adapters {', '.join(model.adapters)}" if model.adapters else ""
    say(f"{info.device}{threads}; contexts of {info.n_context} tokens, {room}{adapters}; Ctrl-C stops")

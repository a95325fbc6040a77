"""What an artifact's numbers cost on a text: perplexity, divergence and agreement, beside a first one, and llama.cpp's.

    python bench/perplexity.py book.txt f32.so int8.so int4.so
    python bench/perplexity.py book.txt f32.so int4.so model-q4_0.gguf --llama-cpp ENV/bin/python

The text is cut into sequences (--sequence tokens, each behind the token that begins a text, where the model has one);
of each the first artifact's distributions are what the others are compared with, at every position.  The same token
ids go to all, so that tokenizers do not matter.  A .gguf file is read by llama.cpp, through llama-cpp-python in an
environment of its own.

Columns: bytes of the file; perplexity; the mean and the 99th percentile of KL(first || this) in nats; how often the
most likely token is the first one's.  Behind the perplexity its change, with twice its standard error over sequences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llmc

Array = NDArray[Any]

ROWS = 64
"""Positions that are compared at a time: distributions over 262,144 tokens are large."""


class LlamaCpp:
    """llama.cpp with a .gguf file, in the process of another environment's Python."""

    def __init__(self, python: Path, file: Path, n_tokens: int) -> None:
        command = [str(python), str(Path(__file__)), "--serve", str(file), str(n_tokens)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def logits(self, tokens: list[int]) -> Array:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(tokens).encode() + b"\n")
        self.process.stdin.flush()
        n_vocab = int(self.process.stdout.readline())
        rows = self.process.stdout.read(4 * n_vocab * len(tokens))
        return np.frombuffer(rows, np.float32).reshape(len(tokens), n_vocab)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Tally:
    """What one speaker's distributions of one text were.

    loss: the mean of -log p of the text's own tokens; kl: a divergence for each position; agree: a share of positions.
    """

    loss: float
    kl: list[float]
    agree: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="artifacts, the exact one first; .gguf")
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=24, help="so many, at even distances")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path, help="keep what is measured here, and go on from it")
    parser.add_argument("--llama-cpp", type=Path, help="the Python that has llama-cpp-python")
    options = parser.parse_args()
    with ExitStack() as stack:
        speakers = dict(opened(options, stack))
        sequences = cut(speakers[options.models[0]], options.text.read_text("utf-8"), options)
        tallies = measured(speakers, sequences, options.record)
    print(f"{len(sequences)} sequences, {sum(map(len, sequences))} tokens")
    for line in table(tallies, {path.stem: path.stat().st_size for path in options.models}):
        print(line)


def opened(options: argparse.Namespace, stack: ExitStack) -> Iterator[tuple[Path, Any]]:
    for path in options.models:
        if path.suffix == ".gguf":
            peer = LlamaCpp(options.llama_cpp, path, options.sequence)
            stack.callback(peer.close)
            yield path, peer
        else:
            yield path, stack.enter_context(llmc.load(path, threads=options.threads))


def cut(model: Any, text: str, options: argparse.Namespace) -> list[list[int]]:
    """Sequences of the text's tokens, of one length, at even distances."""
    tokens = model.encode(text)
    begin = tokens[:1] if tokens[:1] == [model.info.bos_token] and model.encode("")[:1] == tokens[:1] else []
    tokens, step = tokens[len(begin) :], options.sequence - len(begin)
    n_all = len(tokens) // step
    n = min(options.sequences, n_all)
    firsts = [i * n_all // n * step for i in range(n)]
    return [[*begin, *tokens[first : first + step]] for first in firsts]


def measured(speakers: dict[Path, Any], sequences: list[list[int]], record: Path | None) -> dict[str, list[Tally]]:
    """A tally of each sequence, by speaker; those that the record has are not made again, and new ones are added."""
    found = json.loads(record.read_text()) if record and record.exists() else {}
    exact_of = next(iter(speakers.values()))
    keys = [hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16] for tokens in sequences]
    for i, (key, tokens) in enumerate(zip(keys, sequences, strict=True)):
        lacking = {path: speaker for path, speaker in speakers.items() if key not in found.setdefault(path.stem, {})}
        if not lacking:
            continue
        exact = exact_of.logits(tokens)
        for path, speaker in lacking.items():
            logits = exact if speaker is exact_of else speaker.logits(tokens)
            found[path.stem][key] = list(astuple(tally(tokens, exact, logits)))
        if record:
            record.write_text(json.dumps(found))
        print(f"{i + 1} of {len(sequences)}", end="\r", file=sys.stderr, flush=True)
    return {path.stem: [Tally(*found[path.stem][key]) for key in keys] for path in speakers}


def tally(tokens: list[int], exact: Array, found: Array) -> Tally:
    """exact, found: logits [n_tokens, n_vocab]; what the last token is followed by is not known."""
    losses, kl, agrees = [], [], []
    for first in range(0, len(tokens) - 1, ROWS):
        rows = slice(first, min(first + ROWS, len(tokens) - 1))
        p, q = log_softmax(exact[rows]), log_softmax(found[rows])
        losses.append(-q[np.arange(len(q)), tokens[rows.start + 1 : rows.stop + 1]])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agrees.append(p.argmax(-1) == q.argmax(-1))
    mean = float(np.concatenate(losses).mean(dtype=np.float64))
    return Tally(mean, np.concatenate(kl).round(7).tolist(), float(np.concatenate(agrees).mean()))


def table(tallies: dict[str, list[Tally]], sizes: dict[str, int]) -> Iterator[str]:
    yield "| | MB | perplexity | | KL, mean | 99 % | same token |"
    yield "|---|---|---|---|---|---|---|"
    first = np.array([one.loss for one in next(iter(tallies.values()))])
    for name, of_one in tallies.items():
        own, kl = np.array([one.loss for one in of_one]), np.concatenate([one.kl for one in of_one])
        change, error = (own - first).mean(), 2 * (own - first).std() / len(own) ** 0.5
        yield (
            f"| {name} | {sizes[name] / 1e6:.1f} | {np.exp(own.mean()):.3f} | {np.expm1(change):+.2%} ± {error:.2%} "
            f"| {kl.mean():.5f} | {np.quantile(kl, 0.99):.4f} | {np.mean([one.agree for one in of_one]):.2%} |"
        )


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float32))
    return found


def serve(file: str, n_tokens: int) -> None:
    """In llama.cpp's environment: token ids of a text a line in, its logits out."""
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    model = llama_cpp.Llama(file, n_ctx=n_tokens, n_batch=512, logits_all=True, verbose=False)
    for line in sys.stdin:
        tokens = json.loads(line)
        model.reset()
        model.eval(tokens)
        sys.stdout.buffer.write(f"{model.n_vocab()}\n".encode())
        sys.stdout.buffer.write(np.ascontiguousarray(model.scores[: len(tokens)], np.float32).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()

"""What the process of a peer speaks: one JSON object a line on standard input, one answer a line on standard output.

    {"do": "prepare", "config": {…}, "source": DIR, "out": PATH, "precision": "int8"}       -> {"files": PATH}
    {"do": "load", "path": PATH, "config": {…}, "precision": "int8", "threads": 2,
     "room": 300, "batches": [1, 4]}                                       -> {"version": "x 1.2", "load_s": s}
    {"do": "prefill", "prompt": [ids]}                                                      -> {"seconds": [s]}
    {"do": "decode", "prompts": [[ids], …], "steps": 8}                                     -> {"seconds": [s, …]}
    {"do": "memory"}                                                                        -> {"peak_bytes": n}

Systems of `llmc bench` whose KV cache can be written are asked for long contexts without reading them:

    {"do": "repeated", "prompt": [ids], "batch": 4, "context": 4000, "steps": 8}            -> {"seconds": [s, …]}

and one between whose steps something else is done, as reads of memory, to hold such sequences:

    {"do": "hold", "prompt": [ids], "batch": 4, "context": 4000}                            -> {}
    {"do": "step"}                                                                          -> {"seconds": [s]}

An answer of {"error": "one line"} is the peer's refusal.  The file is imported by every peer in its own environment:
the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Refusal(Exception):
    """The peer cannot do this; the text is the reason, one line."""


@dataclass(frozen=True)
class Loading:
    """What a peer is told when it loads a model.

    room: most tokens of a sequence, prompt and decoded together.  batches: how many sequences a decode step will have.
    kv_tokens: room for the tokens of all sequences together; 0: room enough for all batches.
    weights, seed: what llmc.compiler's load_source takes, where a peer loads `path` through it.  device: cpu or cuda.
    """

    path: Path
    config: dict[str, Any]
    precision: str
    threads: int
    room: int
    batches: tuple[int, ...]
    kv_tokens: int = 0
    weights: str = "random"
    seed: int = 0
    device: str = "cpu"


class Peer(Protocol):
    """One system under measurement.  Times are seconds of the wall clock, seen by a caller of the peer's own API."""

    def prepare(self, config: dict[str, Any], source: Path, out: Path, precision: str) -> None:
        """Write the model's files at `out`, from the folder `source` in Hugging Face's layout or the configuration."""

    def load(self, loading: Loading) -> str:
        """Make ready; the names and versions of what is measured."""

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token, in an empty context."""

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of so many steps, greedy, all sequences in one step; the prompts themselves are not timed."""


def serve(peer: Peer) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes with their errors
    for line in sys.stdin:
        try:
            answer = answer_to(peer, json.loads(line))
        except Exception as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


def answer_to(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Do one request."""
    match request.pop("do"):
        case "prepare":
            out, part = Path(request["out"]), Path(request["out"] + ".part")
            out.parent.mkdir(parents=True, exist_ok=True)
            peer.prepare(request["config"], Path(request["source"]), part, request["precision"])
            part.replace(out)
            return {"files": str(out)}
        case "load":
            request |= {"path": Path(request["path"]), "batches": tuple(request["batches"])}
            began = time.perf_counter()
            version = peer.load(Loading(**request))
            return {"version": version, "load_s": time.perf_counter() - began}
        case "prefill":
            return {"seconds": [peer.prefill(request["prompt"])]}
        case "decode":
            return {"seconds": peer.decode(request["prompts"], request["steps"])}
        case "repeated":
            return {"seconds": peer.repeated(**request)}  # type: ignore[attr-defined]
        case "hold":
            peer.hold(**request)  # type: ignore[attr-defined]
            return {}
        case "step":
            return {"seconds": peer.step()}  # type: ignore[attr-defined]
        case "memory":
            return {"peak_bytes": peak_bytes()}
        case other:
            raise Refusal(f"no such request: {other}")


def peak_bytes() -> int:
    """The most memory that this process had at once, mapped files included.  Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def one_line(error: Exception) -> str:
    """An error's first line with any words, its type before it unless it is a refusal."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

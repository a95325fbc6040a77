"""Decode and prefill of an artifact against the limits of the machine, measured in the same run.

    llmc compile llama2-7b --weights random --dtype bf16 --max-seq 1280 -o build/llama2-7b.so
    python bench/decode.py build/llama2-7b.so [--batch 1,2,4,8] [--context 128] [--prefill 512,1024] [--steps 9]
                                              [--record bench/records/NAME.json]

A decode step must read every weight once (but for the rows of the embedding that it does not look up) and the keys and
values of each context. Every step stands between two reads of a large buffer by as many threads, and its share is what
it reads a second over what those two did, the median of all steps: bandwidth may change at any moment on a machine that
others use.  A prompt's
operations (linear layers and causal attention) are set against what the multiply-add units do before and after it:
vdpbf16ps for bf16, vpdpbusd for int8.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmc.bench.chart import memory
from llmc.bench.contexts import context_bytes
from llmc.bench.limits import arithmetic_peak, cpu_name, multiplied, reader
from llmc.runtime import load
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.binding import Model

BUFFER_BYTES = 1 << 30
PREFILL_TIMES = 3
PER_ROW = 32
"""A body whose operations are counted; its rows are all alike."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prefill", default="", help="also time prompts of so many tokens, such as 512,1024")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    batches = [int(size) for size in options.batch.split(",")]
    prefills = [int(n) for n in options.prefill.split(",") if n]
    record = measure(options.artifact, batches, options.context, prefills, options.steps, options.threads)
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def measure(
    path: Path, batches: Sequence[int], context: int, prefills: Sequence[int], steps: int, threads: int
) -> dict[str, Any]:
    """Step times at every batch size, interleaved with each other and with reads of memory."""
    with ArtifactFile.open(path) as file:
        manifest = file.manifest()
    room = sum(batches) * (context + steps + 66) + max(prefills, default=0) + 64
    with load(path, threads=threads, kv_tokens=room) as model:
        n_threads = model.info.n_threads
        prompt = [1 + i % 1000 for i in range(max(context, *prefills, 0))]
        prompts = [prefill_record(manifest, model, prompt[:n], n_threads) for n in prefills]
        times, reads = step_times(model, batches, prompt[:context], steps)
    bandwidths = [BUFFER_BYTES / seconds / 1e9 for size in batches for seconds in reads[size]]
    record: dict[str, Any] = {
        "model": manifest["model"]["name"],
        "dtype": manifest["model"]["dtype"],
        "quant": manifest["quant"] and manifest["quant"]["name"],
        "target": manifest["target"]["name"],
        "context": context,
        "threads": n_threads,
        "read_gb_per_s": round(statistics.median(bandwidths), 2),
        "read_gb_per_s_range": [round(bound(bandwidths), 1) for bound in (min, max)],
        "decode": [
            decode_record(manifest, context, size, times[size], reads[size], times[batches[0]]) for size in batches
        ],
    }
    if prompts:
        record["prefill"] = prompts
    return record | {
        "machine": f"{cpu_name()}, {n_threads} threads",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def step_times(
    model: Model, batches: Sequence[int], prompt: list[int], steps: int
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Seconds of each step of each batch size, and of the reads of memory around it."""
    read_seconds, n_threads = reader(), model.info.n_threads
    decoders = {size: decoder(model, size, prompt) for size in batches}
    times: dict[int, list[float]] = {size: [] for size in batches}
    reads: dict[int, list[float]] = {size: [] for size in batches}
    for step in range(steps + 1):
        before = read_seconds(n_threads, BUFFER_BYTES)
        for size in batches:
            seconds = timed(lambda size=size: next(decoders[size]))  # type: ignore[misc]
            time.sleep(0.01)  # the model's threads still spin for a moment, and would share the CPUs
            after = read_seconds(n_threads, BUFFER_BYTES)
            if step:  # the first brings the weights into memory
                times[size].append(seconds)
                reads[size].append((before + after) / 2)
            before = after
    return times, reads


def decode_record(
    manifest: dict[str, Any], context: int, size: int, times: list[float], reads: list[float], first: list[float]
) -> dict[str, Any]:
    """One batch size: tokens a second, and the step's share of the read bandwidth."""
    seconds = statistics.median(times)
    n_bytes = bytes_per_step(manifest, size, context)
    shares = [n_bytes / step / (BUFFER_BYTES / read) for step, read in zip(times, reads, strict=True)]
    return {
        "batch": size,
        "tokens_per_s": round(size / seconds, 3),
        "step_ms": round(1e3 * seconds, 1),
        "step_ms_range": [round(1e3 * s, 1) for s in (min(times), max(times))],
        "bytes": n_bytes,
        "share_of_read_bandwidth": round(statistics.median(shares), 3),
        "share_range": [round(bound(shares), 3) for bound in (min, max)],
        "times_batch_of_first": round(statistics.median(t / f for t, f in zip(times, first, strict=True)), 3),
    }


def prefill_record(manifest: dict[str, Any], model: Model, prompt: list[int], threads: int) -> dict[str, Any]:
    """A prompt's tokens a second, and the share of the peak of the unit that multiplies its linear layers."""
    quant = manifest["quant"] and manifest["quant"]["name"]
    kind = multiplied(manifest["model"]["dtype"], quant)
    fresh(model, prompt)
    seconds, peaks = [], [arithmetic_peak(threads, kind)]
    for _ in range(PREFILL_TIMES):
        time.sleep(0.01)
        seconds.append(timed(lambda: fresh(model, prompt)))
        time.sleep(0.01)
        peaks.append(arithmetic_peak(threads, kind))
    operations = prompt_operations(manifest, len(prompt))
    around = [(before + after) / 2 for before, after in pairwise(peaks)]
    shares = [operations / s / peak for s, peak in zip(seconds, around, strict=True)]
    return {
        "tokens": len(prompt),
        "tokens_per_s": round(len(prompt) / statistics.median(seconds), 2),
        "seconds": [round(s, 3) for s in seconds],
        "gflop": round(operations / 1e9, 1),
        "peak_of": kind,
        "peak_gflop_per_s": [round(p / 1e9, 1) for p in peaks],
        "share_of_peak": round(statistics.median(shares), 3),
    }


def prompt_operations(manifest: dict[str, Any], n_tokens: int) -> int:
    """Operations of a prompt: the linear layers and experts for every token, attention of each to those before it."""
    rows = [entry for entry in manifest["schedules"] if entry["plan"] == "body" and entry["m"] == PER_ROW]
    linear = (
        sum(e["nodes"] * e["operations"] for e in rows if re.search("Linear|Experts|HeadProduct", e["op"])) // PER_ROW
    )
    attention = 0
    for entry in (entry for entry in rows if entry["op"].endswith("Attention")):
        facts = dict(part.split("=") for part in re.findall(r"\w+=-?\d+", entry["call"]))
        width = 2 * int(facts["head_dim"])
        if "latent_dim" in facts:  # keys are longer than values
            width = 2 * int(facts["latent_dim"]) + int(facts["rotary_dim"])
        pairs = twice_in_sight(n_tokens, int(facts.get("window", 0)))
        attention += entry["nodes"] * int(facts["num_heads"]) * width * pairs
    return int(linear * n_tokens + attention)


def twice_in_sight(n_tokens: int, window: int) -> int:
    """Twice the pairs of a token and one that it sees; a negative window is a chunk."""
    if window < 0:
        whole, rest = divmod(n_tokens, -window)
        return whole * window**2 + rest**2
    return n_tokens**2 if not 0 < window < n_tokens else window * (2 * n_tokens - window)


def decoder(model: Model, size: int, prompt: list[int]) -> Iterator[None]:
    """Each next() is one decode step of `size` sequences."""
    sequences = [model.sequence() for _ in range(size)]
    model.step([(sequence, prompt) for sequence in sequences])
    while True:
        model.step([(sequence, [sequence.sample()]) for sequence in sequences])
        yield


def fresh(model: Model, prompt: list[int]) -> None:
    with model.sequence() as sequence:
        sequence.feed(prompt)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bytes_per_step(manifest: dict[str, Any], size: int, context: int) -> int:
    """Weights that a step of `size` sequences reads, and what it sees of their caches of `context` tokens each."""
    weights = memory.read_bytes(memory.weight_sizes(manifest), size)
    return int(weights + size * context_bytes(manifest["kv_cache"], context))


if __name__ == "__main__":
    main()

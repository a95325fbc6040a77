"""Decode and prefill of an artifact against the limits of the machine, measured in the same run.

    llmc compile llama2-7b --weights random --dtype bf16 --max-seq 1280 -o build/llama2-7b.so
    python bench/decode.py build/llama2-7b.so [--batch 1,2,4,8] [--context 128] [--prefill 512] [--steps 9]
                                              [--record bench/records/NAME.json]

A decode step must read every weight once (but for the rows of the embedding that it does not look up) and the keys and
values of each context. Steps at each batch size alternate with reads of a large buffer by as many threads; shares are
ratios of medians: the bytes a step must read over its time, against the bytes of the buffer over its time.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmc.runtime import load
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.binding import Model

BUFFER_BYTES = 1 << 30
Read = Callable[[int, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch", default="1,2,4,8")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of so many tokens")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    batches = [int(size) for size in options.batch.split(",")]
    record = measure(options.artifact, batches, options.context, options.prefill, options.steps, options.threads)
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def measure(path: Path, batches: Sequence[int], context: int, prefill: int, steps: int, threads: int) -> dict[str, Any]:
    """Step times at every batch size, interleaved with each other and with reads of memory."""
    with ArtifactFile.open(path) as file:
        manifest = file.manifest()
    read_seconds = reader()
    room = sum(batches) * (context + steps + 66) + 2 * prefill
    with load(path, threads=threads, kv_tokens=room) as model:
        n_threads = model.info.n_threads
        prompt = [1 + i % 1000 for i in range(max(context, prefill))]
        prefills = [timed(lambda: fresh(model, prompt[:prefill])) for _ in range(3)] if prefill else []
        decoders = {size: decoder(model, size, prompt[:context]) for size in batches}
        times: dict[int, list[float]] = {size: [] for size in batches}
        reads: list[float] = []
        for step in range(steps + 1):
            for size in batches:
                seconds = timed(lambda size=size: next(decoders[size]))  # type: ignore[misc]
                time.sleep(0.01)  # the model's threads still spin for a moment, and would share the CPUs
                read = read_seconds(n_threads, BUFFER_BYTES)
                if step:  # the first brings the weights into memory
                    times[size].append(seconds)
                    reads.append(read)
    bandwidth = BUFFER_BYTES / statistics.median(reads)
    record: dict[str, Any] = {
        "model": manifest["model"]["name"],
        "dtype": manifest["model"]["dtype"],
        "target": manifest["target"]["name"],
        "context": context,
        "threads": n_threads,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "read_gb_per_s_range": [round(BUFFER_BYTES / s / 1e9, 1) for s in (max(reads), min(reads))],
        "decode": [
            decode_record(manifest, context, size, times[size], bandwidth, times[batches[0]]) for size in batches
        ],
    }
    if prefill:
        seconds = statistics.median(prefills)
        record["prefill"] = {"tokens": prefill, "tokens_per_s": round(prefill / seconds, 1), "seconds": prefills}
    return record | {
        "machine": f"{cpu_name()}, {n_threads} threads",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def decode_record(
    manifest: dict[str, Any], context: int, size: int, times: list[float], bandwidth: float, first: list[float]
) -> dict[str, Any]:
    """One batch size: tokens a second, and the step's share of the read bandwidth."""
    seconds = statistics.median(times)
    n_bytes = bytes_per_step(manifest, size * context)
    return {
        "batch": size,
        "tokens_per_s": round(size / seconds, 3),
        "step_ms": round(1e3 * seconds, 1),
        "step_ms_range": [round(1e3 * s, 1) for s in (min(times), max(times))],
        "bytes": n_bytes,
        "share_of_read_bandwidth": round(n_bytes / seconds / bandwidth, 3),
        "times_batch_of_first": round(statistics.median(t / f for t, f in zip(times, first, strict=True)), 3),
    }


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


def bytes_per_step(manifest: dict[str, Any], tokens: int) -> int:
    """Weights that a step reads, and the cache of `tokens` tokens."""
    tables = [w for w in manifest["weights"] if "row-major" in w["layout"] and w["bytes"] > 1 << 20]
    weights = manifest["memory"]["weight_bytes"] - sum(w["bytes"] for w in tables)
    return int(weights + tokens * manifest["kv_cache"]["bytes_per_token"])


def reader() -> Read:
    """bench/read_bandwidth.c, compiled."""
    source = Path(__file__).with_name("read_bandwidth.c")
    library = Path(tempfile.mkdtemp(prefix="llmc-bench-")) / "read.so"
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library), "-lpthread"]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).read_seconds
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_size_t]
    read: Read = function
    return read


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

"""Decode speed of an artifact against the limit of the machine, measured in the same run.

    llmc compile llama2-7b --weights random --dtype bf16 --batch 1 -o build/llama2-7b.so
    python bench/decode.py build/llama2-7b.so [--context 128] [--steps 12] [--record bench/records/NAME.json]

A decode step at batch 1 must read every weight once (but for the rows of the embedding that it does not look up), and
the keys and values of the context. Steps alternate with reads of a large buffer by as many threads; the figure is the
ratio of the two medians: bytes a step must read over its time, as a share of the read bandwidth.
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
from pathlib import Path
from typing import Any

from llmc.runtime import load
from llmc.runtime.artifact import ArtifactFile

BUFFER_BYTES = 512 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    record = measure(options.artifact, options.context, options.steps, options.threads)
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def measure(path: Path, context: int, steps: int, threads: int) -> dict[str, Any]:
    """Decode `steps` tokens after a prompt of `context`, alternating with reads of memory."""
    with ArtifactFile.open(path) as file:
        manifest = file.manifest()
    read_seconds = reader()
    with load(path, threads=threads) as model:
        sequence = model.sequence()
        began = time.perf_counter()
        sequence.feed([1 + i % 1000 for i in range(context)])
        prefill = time.perf_counter() - began
        decode, reads = [], []
        for step in range(steps + 2):
            token = sequence.sample()
            began = time.perf_counter()
            sequence.feed([token])
            seconds = time.perf_counter() - began
            read = read_seconds(model.info.n_threads, BUFFER_BYTES)
            if step >= 2:  # the first steps bring the weights into memory
                decode.append(seconds)
                reads.append(read)
        n_threads = model.info.n_threads
    n_bytes = bytes_per_step(manifest, context + steps // 2)
    bandwidth = BUFFER_BYTES / statistics.median(reads)
    step_seconds = statistics.median(decode)
    return {
        "model": manifest["model"]["name"],
        "dtype": manifest["model"]["dtype"],
        "target": manifest["target"]["name"],
        "context": context,
        "threads": n_threads,
        "decode_tokens_per_s": round(1 / step_seconds, 3),
        "prefill_tokens_per_s": round(context / prefill, 1),
        "bytes_per_step": n_bytes,
        "step_ms": [round(1e3 * s, 1) for s in sorted(decode)],
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "share_of_read_bandwidth": round(n_bytes / step_seconds / bandwidth, 3),
        "machine": cpu_name(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def bytes_per_step(manifest: dict[str, Any], tokens: int) -> int:
    """Weights that a step reads, and the cache of `tokens` tokens."""
    tables = [w for w in manifest["weights"] if "row-major" in w["layout"] and w["bytes"] > 1 << 20]
    weights = manifest["memory"]["weight_bytes"] - sum(w["bytes"] for w in tables)
    return int(weights + tokens * manifest["kv_cache"]["bytes_per_token"])


def reader() -> Any:
    """bench/read_bandwidth.c, compiled."""
    source = Path(__file__).with_name("read_bandwidth.c")
    library = Path(tempfile.mkdtemp(prefix="llmc-bench-")) / "read.so"
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library), "-lpthread"]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).read_seconds
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_size_t]
    return function


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

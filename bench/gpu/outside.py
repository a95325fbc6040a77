"""One stage's items under another program (compute-sanitizer, ncu): a process with a journal of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmc.bench.gpu.journal import Entry, Journal
from llmc.bench.gpu.kit import Kit

ENVIRONMENT = {"LLMC_REFERENCE": "cpu", "LLMC_FEW_STEPS": "1", "OMP_NUM_THREADS": "1"}
"""For what runs under another program, many beside each other: the GPU is for what is examined, and each launch takes a
while."""


def run_under(
    command: Sequence[str],
    kit: Kit,
    stage: str,
    all_items: Sequence[str],
    wanted: Callable[[str], bool],
    seconds: float,
) -> tuple[int, str, dict[str, Entry]]:
    """Exit status, output, and what became of the wanted items.  The others are marked as left out."""
    with tempfile.TemporaryDirectory(prefix="llmc-gpu-") as folder:
        journal = Journal(Path(folder, "results.jsonl"))
        for item in all_items:
            if not wanted(item):
                journal.append(stage, item, "failed", error="left out")
        deadline = f"{time.time() + seconds:.0f}"
        runner = str(kit.folder / "run.py")
        arguments = [*command, sys.executable, runner, "--kit", str(kit.folder), "-o", folder, "--work", stage]
        answer = subprocess.run(
            [*arguments, "--deadline", deadline],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **ENVIRONMENT},
        )
        found = {item: entry for item, entry in journal.latest(stage).items() if wanted(item)}
        return answer.returncode, answer.stdout + answer.stderr, found

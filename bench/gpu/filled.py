"""Where the artifacts lie that were given their weights here: in a folder with room, written once by many processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmc.bench.gpu.fill import Model
from llmc.bench.gpu.journal import last_line
from llmc.bench.gpu.kit import Kit

FOLDER = "llmc-gpu-models"
MOST_PROCESSES = 12
ROOM = 1.1
"""So many times a model's bytes must be free."""


def fill(kit: Kit, names: Sequence[str]) -> None:
    """Write the artifacts of these models, where they are not there yet."""
    for name in names:
        model = model_of(kit, name)
        path = place_of(model)
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                partial = path.with_suffix(".partial")
                model.write(partial, max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1)))
                partial.chmod(0o755)
                partial.replace(path)


def ready(kit: Kit, name: str) -> Path:
    """A model's artifact.  Where it isn't there, a process of its own writes it now: this one may have a GPU open."""
    path = place_of(model_of(kit, name))
    if not path.exists():
        command = [sys.executable, str(kit.folder / "run.py"), "--kit", str(kit.folder), "--fill", name]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"{name} could not be written: {last_line(answer.stderr)}")
    return path


def model_of(kit: Kit, name: str) -> Model:
    return Model(kit.folder / "models" / name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among all processes that ask for this file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def place_of(model: Model) -> Path:
    """Raises RuntimeError: no folder has room."""
    n_bytes, name = int(model.said["weight_bytes"]), f"{model.name}-{model.digest}.so"
    chosen = os.environ.get("LLMC_GPU_WORK")
    places = [Path(place, FOLDER) for place in ([chosen] if chosen else ["/dev/shm", tempfile.gettempdir(), "."])]
    for folder in places:  # written already, or being written
        if (folder / name).exists() or (folder / name).with_suffix(".partial").exists():
            return folder / name
    for folder in places:  # memory first, since the file is read but once or twice
        if folder.parent.is_dir() and shutil.disk_usage(folder.parent).free > ROOM * n_bytes:
            folder.mkdir(exist_ok=True)
            return folder / name
    raise RuntimeError(f"no folder has {n_bytes / 1e9:.1f} GB free; name one in LLMC_GPU_WORK")

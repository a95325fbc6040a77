"""What was found, a JSON line each, written at once and whole, so that a lost machine loses nothing.

An item of a stage is begun, and then done or failed; what was begun and is neither was ended by a crash.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Event = Literal["begin", "done", "failed"]
Entry = dict[str, Any]


class Journal:
    """The file of lines at `path`; several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, stage: str, item: str, event: Event, **said: Any) -> None:
        line = json.dumps({"stage": stage, "item": item, "event": event, "at": round(time.time(), 1), **said})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, f"{line}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def take_over(self, other: Path) -> None:
        """Begin with what another run found; a line that was cut off is left out."""
        text = other.read_bytes()
        self.path.write_bytes(text[: text.rfind(b"\n") + 1])

    def entries(self) -> Iterator[Entry]:
        """Every whole line; one that was cut off by a crash is left out."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def latest(self, stage: str) -> dict[str, Entry]:
        """The last entry of each item of a stage."""
        return {entry["item"]: entry for entry in self.entries() if entry.get("stage") == stage}

    def results(self, stage: str) -> dict[str, Entry]:
        """Those that are done."""
        return {item: entry for item, entry in self.latest(stage).items() if entry["event"] == "done"}

    def settled(self, stage: str) -> set[str]:
        """Items that need no further try."""
        return {item for item, entry in self.latest(stage).items() if entry["event"] in ("done", "failed")}

    def one(self, stage: str, item: str) -> Mapping[str, Any]:
        """What was found for an item; nothing where it is not done."""
        return self.results(stage).get(item, {})

"""What was found, a JSON line each, written at once and whole, so that a lost machine loses nothing.

An item of a stage is begun, and then done or failed; what was begun and is neither was ended by a crash.  What another
card, or another driver, said before is forgotten.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from llmc.runtime.parse_json import parse_json

Event = Literal["begin", "done", "failed"]
Entry = dict[str, Any]
TELLS_APART = {"device": "name", "machine": "driver"}
"""Facts that tell one machine from another, and the field of each that does."""
TAIL_BYTES = 1 << 16
"""The last line is looked for in: those of timelines are the longest, of 20 KB."""
LONGEST_ERROR = 3000


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
        """Begin with what another run found, or also with that; a line that was cut off is left out."""
        text = other.read_bytes()
        with self.path.open("ab") as file:
            file.write(text[: text.rfind(b"\n") + 1])

    def ask_again(self, stage: str, items: Iterable[str]) -> None:
        """Items that are done shall be done anew."""
        for item in items:
            self.append(stage, item, "begin")

    def entries(self) -> list[Entry]:
        """Every whole line since the card is this one, with this driver; lines that were cut off are left out."""
        entries: list[Entry] = []
        known: dict[str, Any] = {}
        for entry in self._whole():
            if entry.get("stage") == "facts" and entry.get("event") == "done":
                said = entry.get(TELLS_APART.get(str(entry.get("item")), ""))
                if known.setdefault(entry["item"], said) != said:
                    known[entry["item"]] = said
                    entries = [each for each in entries if each.get("stage") in ("facts", "kit")]
            entries.append(entry)
        return entries

    def last(self) -> Entry:
        """The last whole line; nothing where there is none."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                return [{}, *entries_in(file.read().splitlines())][-1]
        except FileNotFoundError:
            return {}

    def _whole(self) -> Iterator[Entry]:
        try:
            lines = self.path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return
        yield from entries_in(lines)

    def latest(self, stage: str) -> dict[str, Entry]:
        """The last entry of each item of a stage."""
        return {entry["item"]: entry for entry in self.entries() if entry.get("stage") == stage and "item" in entry}

    def results(self, stage: str) -> dict[str, Entry]:
        """Those that are done."""
        return {item: entry for item, entry in self.latest(stage).items() if entry["event"] == "done"}

    def failed(self, stage: str) -> set[str]:
        """Items that failed."""
        return {item for item, entry in self.latest(stage).items() if entry["event"] == "failed"}

    def one(self, stage: str, item: str) -> Mapping[str, Any]:
        """What was found for an item; nothing where it is not done."""
        return self.results(stage).get(item, {})


def entries_in(lines: Iterable[str | bytes]) -> Iterator[Entry]:
    """Without lines that were cut off."""
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def one_line(error: BaseException) -> str:
    """What went wrong, as a line has it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]


def last_line(text: str) -> str:
    """What a program said last, which is why it ended."""
    return text.strip().rpartition("\n")[2][:LONGEST_ERROR]

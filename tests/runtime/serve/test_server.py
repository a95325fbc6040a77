"""How a server opens its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.runtime import load
from llmc.runtime.binding import Model
from llmc.runtime.capi import NO_MEMORY
from llmc.runtime.errors import LlmcError
from llmc.runtime.serve import server
from llmc.runtime.serve.server import Options, open_model
from tests.runtime.stub_artifact import N_CONTEXT, write_stub


class Loads:
    """`load`, refused until it is asked for less than there is room for; what it was asked for."""

    def __init__(self, room: int, status: int) -> None:
        self.room, self.status, self.asked = room, status, list[int]()

    def __call__(self, path: str, kv_tokens: int = 0, **options: Any) -> Model:
        self.asked.append(kv_tokens)
        if kv_tokens > self.room:
            raise LlmcError("refused", status=self.status)
        return load(path, kv_tokens=kv_tokens, **options)


def test_less_room_is_tried_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(2 * N_CONTEXT, NO_MEMORY)
    monkeypatch.setattr(server, "load", loads)
    with open_model(str(write_stub(tmp_path / "a.so")), Options(max_batch=8), None) as model:
        assert model.info.kv_tokens == 2 * N_CONTEXT
    assert loads.asked == [n * N_CONTEXT for n in (8, 4, 2)]


@pytest.mark.parametrize("status", [0, 2, 6])
def test_whatever_else_is_wrong_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    loads = Loads(1, status)
    monkeypatch.setattr(server, "load", loads)
    with pytest.raises(LlmcError, match="refused"):
        open_model(str(write_stub(tmp_path / "a.so")), Options(max_batch=8), None)
    assert len(loads.asked) == 1


def test_room_that_was_asked_for_is_had_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(1, NO_MEMORY)
    monkeypatch.setattr(server, "load", loads)
    with pytest.raises(LlmcError, match="refused"):
        open_model(str(write_stub(tmp_path / "a.so")), Options(kv_tokens=99), None)
    assert loads.asked == [99]

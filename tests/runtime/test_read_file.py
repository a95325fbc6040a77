"""Files that may be pipes: read to their end, but not waited for without end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from llmc.runtime import read_file as module
from llmc.runtime.errors import LlmcError
from llmc.runtime.read_file import read_file, refuse_pipe

LONG = bytes(range(256)) * 1024
"""More than a pipe has room for."""


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_file_is_read_whole_or_as_far_as_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LONG)
    assert read_file(tmp_path / "file") == LONG
    assert read_file(tmp_path / "file", 5) == LONG[:5]
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(IsADirectoryError) as error:
        read_file(tmp_path)
    assert (error.value.filename, len(os.listdir("/proc/self/fd"))) == (str(tmp_path), n_open)


@pytest.mark.parametrize("pause_s", [0, 0.1])
def test_a_pipe_is_read_to_its_end_however_late_its_writer_is(pipe: Path, pause_s: float) -> None:
    def write() -> None:
        time.sleep(pause_s)
        with pipe.open("wb") as file:
            time.sleep(pause_s)
            file.write(LONG)

    writer = threading.Thread(target=write)
    writer.start()
    assert read_file(pipe) == LONG
    writer.join()


def test_of_a_pipe_no_more_is_read_than_asked(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "first_bytes", lambda descriptor, place: os.read(descriptor, 1))
    with open(os.open(pipe, os.O_RDWR), "wb") as both:
        both.write(b"a text")
        both.flush()
        assert read_file(pipe, 5) == b"a tex"


def test_a_writer_may_have_gone(pipe: Path) -> None:
    with open(os.open(pipe, os.O_RDWR), "wb") as both:
        both.write(b"text")
        both.flush()
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert read_file(f"/dev/fd/{reader}") == b"text"
    os.close(reader)


def test_a_pipe_that_nobody_writes_to_is_given_up(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    with pytest.raises(LlmcError, match="nobody writes to this pipe"):
        read_file(pipe)


def test_what_is_read_in_pieces_is_no_pipe(pipe: Path, tmp_path: Path) -> None:
    refuse_pipe(tmp_path / "none")
    with pytest.raises(LlmcError, match="a pipe or a device"):
        refuse_pipe(pipe)

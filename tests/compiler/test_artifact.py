"""compiler/artifact.py"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from llmc.compiler.artifact import (
    HUGE_PAGE_BYTES,
    ArtifactWriter,
    check_place,
    check_room,
    encode_vocabulary,
    in_huge_pages,
    remove_abandoned,
)
from llmc.runtime.artifact import ArtifactFile
from llmc.runtime.errors import LlmcError


def write(path: Path, manifest: dict[str, object]) -> None:
    with ArtifactWriter(path) as writer:
        writer.add("code", iter([b"\x7fELF", b"code"]))
        writer.add("weights", iter([bytes(5000)]), alignment=4096)
        writer.add("plan", iter([b"plan"]))
        writer.finish({"certificate": "a longer one, replaced below" * 100})
        writer.finish(manifest)
        writer.publish()


def stop_in_the_middle(path: Path, why: BaseException) -> None:
    with ArtifactWriter(path) as writer:
        writer.add("code", iter([b"code"]))
        raise why


def test_sections_are_read_back_with_the_last_manifest(tmp_path: Path) -> None:
    write(tmp_path / "a.so", {"certificate": "passed"})
    with ArtifactFile.open(tmp_path / "a.so") as file:
        assert file.manifest() == {"certificate": "passed"}
        sizes = {section.name: section.n_bytes for section in file.sections.values()}
        assert list(sizes) == ["code", "weights", "plan", "manifest"]
        assert (sizes["code"], sizes["weights"], sizes["plan"]) == (8, 5000, 4)
        assert file.sections["weights"].offset == 4096
        file.check_weights()


def test_an_artifact_that_was_not_published_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stop_in_the_middle(tmp_path / "a.so", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_an_older_artifact_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.so", {"version": 1})
    with pytest.raises(KeyboardInterrupt):
        stop_in_the_middle(tmp_path / "a.so", KeyboardInterrupt())
    with ArtifactFile.open(tmp_path / "a.so") as file:
        assert file.manifest() == {"version": 1}


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LlmcError, match="the disk is full"), ArtifactWriter(tmp_path / "a.so") as writer:
        writer.add("weights", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(LlmcError, match=r"needs 13,500 MB, but the disk has 1,000 MB free"):
        check_room(tmp_path / "a.so", int(13.5e9))


WRITER = """
import sys, time
from pathlib import Path
from llmc.compiler.artifact import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1])) as writer:
    writer.add("code", iter([b"\x7fELF" + bytes(1 << 20)]))
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_was_writing_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Not while it lives: the lock on the file tells, and ends with whoever has it."""
    others = [".notes.12.partial", ".a.so.partial"]
    for name in others:
        (tmp_path / name).write_text("somebody else's")
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.so")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = process.stdout.readline()
        check_room(tmp_path / "b.so", 1)
        left = {path.name for path in tmp_path.iterdir()}
        process.kill()
    assert (said, left) == ("writing\n", {*others, f".a.so.{process.pid}.partial"})
    check_room(tmp_path / "b.so", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_an_artifact_whose_file_is_removed_before_it_is_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may see the file in between, and take it for one that was left."""
    lock, n_locked = fcntl.flock, 0

    def late(file: BinaryIO, how: int) -> None:
        nonlocal n_locked
        if how == fcntl.LOCK_EX and not n_locked:
            remove_abandoned(tmp_path)
        n_locked += 1
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "a.so", {"version": 1})
    assert n_locked > 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.so"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LlmcError, match="cannot write the artifact"), ArtifactWriter(tmp_path / "file" / "a.so"):
        pass


def test_a_disk_that_is_full_when_the_file_is_closed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ArtifactWriter(tmp_path / "a.so") as writer:
        writer.file.close()
        monkeypatch.setattr(writer, "file", SimpleNamespace(close=close))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LlmcError, match="a device or a pipe"):
        check_place(tmp_path / "pipe")
    with pytest.raises(LlmcError, match="a device or a pipe"):
        check_place(Path(os.devnull))
    with pytest.raises(LlmcError, match="is a directory"):
        check_place(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, f"{'x' * 300}/a.so"])
def test_a_name_too_long_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(LlmcError, match="too long"):
        check_place(tmp_path / name)


def test_a_models_own_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "link").symlink_to(tmp_path / "model.safetensors")
    for name in ("model.safetensors", "link"):
        with pytest.raises(LlmcError, match="a file of the model"):
            check_place(tmp_path / name, tmp_path)
    check_place(tmp_path / "model.safetensors")
    check_place(tmp_path / "new.so", tmp_path)
    with ArtifactWriter(tmp_path / "old.so") as writer:
        writer.finish({})
        writer.publish()
    check_place(tmp_path / "old.so", tmp_path)


def test_a_place_below_a_file_or_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LlmcError, match="is not a folder"):
        check_place(tmp_path / "file" / "a.so")
    check_place(tmp_path / "new" / "folder" / "a.so")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(LlmcError, match="no permission"):
        check_place(tmp_path / "a.so")


def test_vocabulary_holds_each_tokens_bytes() -> None:
    data = encode_vocabulary([b"a", b"", b"\xc3\xa9"])
    assert data == b"\x03\0\0\0\0\0\0\0\x01\0\0\0\x01\0\0\0\x03\0\0\0a\xc3\xa9"


@pytest.mark.parametrize("start", [0, 4096, HUGE_PAGE_BYTES - 256, HUGE_PAGE_BYTES + 64])
def test_weights_are_written_in_whole_huge_pages(start: int) -> None:
    page = HUGE_PAGE_BYTES
    chunks = [bytes([i]) * n for i, n in enumerate((256, page - 256, 3 * page + 77, 0, page, 1, 5 * page, page - 1))]
    pieces = list(in_huge_pages(chunks, start))
    assert b"".join(pieces) == b"".join(chunks)
    ends = accumulate(len(piece) for piece in pieces[:-1])
    assert all((start + end) % page == 0 for end in ends)

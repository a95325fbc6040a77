"""A sequence in a file: it goes on as it was, and no other program reads it."""

from __future__ import annotations

import ctypes as c
import os
import resource
import stat
from pathlib import Path

import pytest

from llmc.runtime import format as fmt
from llmc.runtime.capi import Handle
from tests.runtime import toy_artifact as toy
from tests.runtime.test_c_steps import TEXT
from tests.runtime.toy_model import ARGUMENT, FORMAT, IO, MEMORY, Model, Refused, Text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "text.seq"


def goes_on(sequence: Text, text: list[int], more: list[int]) -> None:
    """It knows these tokens, and what they say; then more of them."""
    assert sequence.tokens() == text
    assert sequence.logits() == toy.oracle(text)[-1]
    for token in more:
        sequence.feed([token])
        text = [*text, token]
        assert sequence.logits() == toy.oracle(text)[-1]
    assert sequence.tokens() == text


@pytest.mark.parametrize("n", [1, 3, 4, 5, 16, 29, 30])
def test_a_sequence_goes_on_where_it_was_saved(toy_so: Path, file: Path, n: int) -> None:
    """In another model, beside another sequence, on another number of threads."""
    with Model(toy_so, n_threads=2) as model:
        model.sequence(TEXT[:n]).save(file, b"of the caller's")
    with Model(toy_so, n_threads=1, kv_tokens=640) as model:
        other = model.sequence(TEXT[5:12])
        sequence = model.restore(file)
        assert sequence.note() == b"of the caller's"
        assert other.note() == b""
        goes_on(sequence, TEXT[:n], TEXT[n:])
        goes_on(model.restore(file), TEXT[:n], TEXT[:1] if n < toy.CONTEXT else [])
        assert other.logits() == toy.oracle(TEXT[5:12])[-1]


def test_tokens_are_those_of_every_way_to_append_and_take_back(toy_so: Path, file: Path) -> None:
    with Model(toy_so, kv_tokens=640) as model:
        sequence, other = model.sequence(), model.sequence(TEXT[:2])
        model.step([(sequence, TEXT[:7]), (other, TEXT[2:4])])
        fork = sequence.fork()
        [token] = model.advance([(fork, None)])
        assert fork.tokens() == [*TEXT[:7], token]
        fork.truncate(5)
        fork.save(file)  # a page that is shared
        sequence.feed(TEXT[7:9])
        fork.feed([40])
        assert [one.tokens() for one in (sequence, other, fork)] == [TEXT[:9], TEXT[:4], [*TEXT[:5], 40]]
        back = model.restore(file)
        with pytest.raises(Refused, match="no logits"):  # as the one that was cut
            back.logits()
        back.feed(TEXT[5:6])
        goes_on(back, TEXT[:6], TEXT[6:9])
        back.truncate(3)
        back.feed([9])
        goes_on(back, [*TEXT[:3], 9], [])


def test_an_empty_sequence_is_one_too(toy_so: Path, file: Path) -> None:
    with Model(toy_so) as model:
        model.sequence().save(file)
        assert file.stat().st_size == fmt.SAVED.size
        back = model.restore(file)
        assert back.tokens() == []
        back.feed(TEXT[:4])
        goes_on(back, TEXT[:4], [])


def test_what_finds_no_room_takes_none(toy_so: Path, file: Path) -> None:
    with Model(toy_so, kv_tokens=toy.CONTEXT) as model:
        sequence = model.sequence(TEXT[:20])
        sequence.save(file)
        n_free = model.info().kv_tokens_free
        with pytest.raises(Refused, match="the KV cache is full") as refused:
            model.restore(file)
        assert refused.value.status == MEMORY
        assert model.info().kv_tokens_free == n_free
        sequence.free()
        goes_on(model.restore(file), TEXT[:20], TEXT[20:22])


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_is_the_owners_alone_and_replaces_the_one_behind_a_link(toy_so: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "deep" / "text.seq", tmp_path / "link"
    file.parent.mkdir()
    file.write_bytes(b"older")
    file.chmod(0o644)
    link.symlink_to(file)
    with Model(toy_so) as model:
        model.sequence(TEXT[:5]).save(link)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert link.is_symlink()
        goes_on(model.restore(link), TEXT[:5], [])
    assert [path.name for path in file.parent.iterdir()] == ["text.seq"]


def test_a_disk_that_is_full_leaves_what_was_there(toy_so: Path, file: Path) -> None:
    with Model(toy_so) as model:
        model.sequence(TEXT[:5]).save(file)
        before = file.read_bytes()
        longer = model.sequence(TEXT[:20])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
        try:
            with pytest.raises(Refused, match="the sequence cannot be saved: writing: File too large") as refused:
                longer.save(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert refused.value.status == IO
        assert file.read_bytes() == before
        assert list(file.parent.iterdir()) == [file]


def test_places_where_no_file_can_be_are_named(toy_so: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with Model(toy_so) as model:
        sequence = model.sequence(TEXT[:5])
        for path, fact in {
            tmp_path: "cannot be saved: what is there is a folder",
            tmp_path / "pipe": "cannot be saved: what is there is no regular file",
            tmp_path / "none" / "x": "making a file beside it: No such file or directory",
            tmp_path / ("x" * 300): "cannot be saved: finding the file: File name too long",
        }.items():
            with pytest.raises(Refused, match=fact):
                sequence.save(path)
        for path, fact in {
            tmp_path: "cannot be restored: this is a folder",
            tmp_path / "pipe": "cannot be restored: this is no regular file",
            tmp_path / "none": "cannot be restored: No such file or directory",
        }.items():
            with pytest.raises(Refused, match=fact) as refused:
                model.restore(path)
            assert refused.value.status == IO
        with pytest.raises(Refused, match="a note of 67108865 bytes is longer than 67108864"):
            sequence.save(tmp_path / "x", bytes((64 << 20) + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_sequence_that_no_text_is_behind_is_not_saved(toy_so: Path, file: Path) -> None:
    with Model(toy_so, kv_tokens=640) as model:
        out = Handle()
        model.check(model.api.sequence_repeat(model.sequence(TEXT[:8]).handle, 12, c.byref(out)))
        made = Text(model, out)
        for one in (made, made.fork()):
            with pytest.raises(Refused, match="made by sequence_repeat") as refused:
                one.save(file)
            assert refused.value.status == ARGUMENT
        made.truncate(0)
        made.feed(TEXT[:3])
        made.save(file)
        goes_on(model.restore(file), TEXT[:3], [])


# -- whose it is -------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, file: Path, sections: dict[str, bytes]) -> str:
    """Why another artifact does not restore a file."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.so"
    path.write_bytes(toy.pack_sections(sections))
    with Model(path) as model:
        n_free = model.info().kv_tokens_free
        with pytest.raises(Refused) as refused:
            model.restore(file)
        assert refused.value.status == FORMAT
        assert model.info().kv_tokens_free == n_free
    fact, *rest = str(refused.value).splitlines()
    assert rest == [f"  at: {file}", "  hint: name another file, or delete this one"]
    return fact


def test_another_programs_file_is_refused_by_name(tmp_path: Path, file: Path, toy_so: Path) -> None:
    code = (toy_so.parent / "code.so").read_bytes()
    sections, plan = toy.toy_sections(code), toy.ToyPlan()
    path = tmp_path / "toy.so"
    path.write_bytes(toy.pack_sections(sections))
    with Model(path) as model:
        model.sequence(TEXT[:5]).save(file)
    weights = sections["weights"] + bytes(64)
    avx2 = fmt.CPU_FEATURES["avx2"]
    assert [
        refusal(tmp_path, file, sections | {"weights": weights}),
        refusal(tmp_path, file, sections | {"plan": plan.pack(cpu_features=avx2)}),
        refusal(tmp_path, file, sections | {"plan": plan.pack(default_kv_tokens=64)}),
        refusal(tmp_path, file, sections | {"code": code + b"\0"}),
    ] == [
        "this sequence is another model's: it was saved by one with other weights",
        "this sequence was saved by the program for cpu, and the one that runs is for cpu with other instructions",
        "this sequence was saved by this model as it was compiled with other options: its plan is another",
        "this sequence was saved by this model as it was compiled by another llmc: its kernels are others",
    ]
    moved = tmp_path / "moved.so"
    moved.write_bytes(toy.pack_sections(sections | {"manifest": b'{"other": 1}'}))
    with Model(moved) as model:  # what the program does not read may be another
        goes_on(model.restore(file), TEXT[:5], [8])

"""Files of sequences that are damaged, or worse: what is wrong is named, and nothing is read beyond them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from llmc.runtime import format as fmt
from tests.runtime import toy_artifact as toy
from tests.runtime.toy_artifact import Host
from tests.runtime.toy_model import FORMAT, OK

HASHED_FROM = 8 + 4 + 4 + 8 + 32
FIELDS = (
    *("magic", "version", "reserved", "file_bytes", "sha256", "weights", "plan", "kernels"),
    *("device", "arch", "features", "has_logits", "adapter", "tokens", "note"),
)
Openings = Callable[[Iterable[bytes]], list[tuple[int, str]]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "text.seq"


@pytest.fixture(scope="module")
def without_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "toy.art"
    path.write_bytes(toy.pack_sections(toy.toy_sections()))
    return path


@pytest.fixture
def good(host: Host, without_code: Path, file: Path) -> bytes:
    assert host("restore", without_code, file) == "0 \n"
    return file.read_bytes()


@pytest.fixture
def openings(host: Host, without_code: Path, tmp_path: Path) -> Openings:
    """Restore files with these contents; gives (status, fact) of each.  Nothing is read beyond them."""

    def run(contents: Iterable[bytes]) -> list[tuple[int, str]]:
        paths = []
        for index, content in enumerate(contents):
            paths.append(tmp_path / f"{index}.seq")
            paths[-1].write_bytes(content)
        lines = host("restore", without_code, *paths).splitlines()
        assert len(lines) == len(paths)
        return [(int(line.split(" ")[0]), line.partition(" ")[2]) for line in lines]

    return run


def hashed(data: bytes) -> bytes:
    """The same with the hash, and the length, that fit it."""
    changed = bytearray(data)
    changed[16:24] = len(data).to_bytes(8, "little")
    changed[24:HASHED_FROM] = hashlib.sha256(data[HASHED_FROM:]).digest()
    return bytes(changed)


def with_header(data: bytes, **changes: Any) -> bytes:
    fields = dict(zip(FIELDS, fmt.SAVED.unpack_from(data), strict=True))
    return fmt.SAVED.pack(*(fields | changes).values()) + data[fmt.SAVED.size :]


def test_the_file_is_what_the_format_says(good: bytes) -> None:
    header = dict(zip(FIELDS, fmt.SAVED.unpack_from(good), strict=True))
    sections = toy.toy_sections()
    digests = {name: hashlib.sha256(sections[name]).digest() for name in ("weights", "plan", "code")}
    pages = 3 * toy.PAGE_BYTES
    n_bytes = fmt.SAVED.size + 6 + 4 * 9 + 4 * toy.VOCAB + pages
    assert header == {
        "magic": fmt.SAVED_MAGIC,
        "version": 1,
        "reserved": 0,
        "file_bytes": n_bytes,
        "sha256": hashlib.sha256(good[HASHED_FROM:]).digest(),
        "weights": digests["weights"],
        "plan": digests["plan"],
        "kernels": digests["code"],
        "device": 0,
        "arch": 0,
        "features": 0,
        "has_logits": 1,
        "adapter": 0,
        "tokens": 9,
        "note": 6,
    }
    assert good == hashed(good)
    assert good[fmt.SAVED.size :].startswith(b"a note\x03\0\0\0\x01\0\0\0")


def test_files_that_were_cut_off_are_refused_at_every_length(openings: Openings, good: bytes) -> None:
    lengths = sorted({*range(0, len(good), 64), *range(0, fmt.SAVED.size + 8, 3), len(good) - 1})
    for length, (status, fact) in zip(lengths, openings(good[:n] for n in lengths), strict=True):
        assert status == FORMAT, (length, fact)
        assert ("truncated" if length >= 8 else "not a saved sequence") in fact, (length, fact)
    [(status, fact)] = openings([good + b"\0"])
    assert (status, fact) == (
        FORMAT,
        f"the saved sequence is damaged: {len(good) + 1} bytes, it should have {len(good)}",
    )


def test_every_field_of_the_header_is_checked(openings: Openings, good: bytes) -> None:
    wild = (1, 2, 3, 9, 10, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
    long = (*wild, 2**32 + 9, 2**62, 2**63, 2**64 - 1, 2**64 - 4)
    changes: list[dict[str, Any]] = [{"magic": b"LLMCSEQ2"}, {"magic": bytes(8)}]
    small = ("version", "reserved", "device", "arch", "features", "adapter", "tokens")
    changes += [{name: value} for name in small for value in wild]
    changes += [{"has_logits": value} for value in (0, *wild[1:])]
    changes += [{name: value} for name in ("file_bytes", "note") for value in long]
    changes += [{name: bytes(32)} for name in ("sha256", "weights", "plan", "kernels")]
    changes = [change for change in changes if change not in ({"version": 1}, {"tokens": 9})]
    files = [with_header(good, **change) for change in changes]
    files += [
        hashed(file) for change, file in zip(changes, files, strict=True) if not {"sha256", "file_bytes"} & {*change}
    ]
    assert {status for status, _ in openings(files)} == {FORMAT}


def test_versions_and_byte_orders_are_named(openings: Openings, good: bytes) -> None:
    facts = [fact for _, fact in openings(with_header(good, version=v) for v in (2, 1 << 24))]
    assert facts == [
        "this sequence was saved in version 2; this artifact reads version 1",
        "this sequence was saved by a machine of another byte order",
    ]


def test_every_byte_counts(openings: Openings, good: bytes) -> None:
    def flipped(at: int) -> bytes:
        return good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :]

    places = [*range(fmt.SAVED.size), *range(fmt.SAVED.size, len(good), 13)]
    results = openings(map(flipped, places))
    assert {status for status, _ in results} == {FORMAT}
    assert {fact for _, fact in results[fmt.SAVED.size :]} == {"the saved sequence is damaged (its SHA-256 differs)"}


def test_tokens_that_there_are_not_are_refused(openings: Openings, good: bytes) -> None:
    at = fmt.SAVED.size + 6 + 4 * 8
    values = (toy.VOCAB, -1, 2**31 - 1, -(2**31))
    files = [hashed(good[:at] + v.to_bytes(4, "little", signed=True) + good[at + 4 :]) for v in values]
    for value, (status, fact) in zip(values, openings(files), strict=True):
        assert status == FORMAT
        assert fact == f"the saved sequence is damaged: its token 8 is {value}, and the vocabulary has {toy.VOCAB}"


def test_random_changes_behind_a_good_hash_do_no_harm(openings: Openings, good: bytes) -> None:
    """Other numbers in pages and logits are a sequence that nobody has read, and no danger: it is fed once more."""
    chance = random.Random(5)

    def spoiled() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(HASHED_FROM, len(data))
            data[at] = chance.choice([data[at] ^ 1 << chance.randrange(8), 0, 0xFF, chance.randrange(256)])
        del data[chance.choice([len(data), chance.randrange(len(data))]) :]
        return hashed(bytes(data)) if len(data) >= HASHED_FROM else bytes(data)

    assert {status for status, _ in openings(spoiled() for _ in range(400))} == {OK, FORMAT}

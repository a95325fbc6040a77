"""Damaged and hostile artifacts: the runtime names what is wrong, and never reads beyond the file."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llmc.runtime import format as fmt
from tests.runtime import toy_artifact as toy
from tests.runtime.toy_artifact import Host

OK, IO, FORMAT, TARGET, MEMORY = 0, 1, 2, 3, 4
Openings = Callable[[Iterable[bytes]], list[tuple[int, str]]]


@pytest.fixture(scope="module")
def good() -> bytes:
    return toy.pack_sections(toy.toy_sections())


@pytest.fixture
def openings(host: Host, tmp_path: Path) -> Openings:
    """Open files with these contents; gives (status, fact) of each."""

    def run(contents: Iterable[bytes]) -> list[tuple[int, str]]:
        paths = []
        for index, content in enumerate(contents):
            paths.append(tmp_path / f"{index}.art")
            paths[-1].write_bytes(content)
        lines = host("open", *paths).splitlines()
        assert len(lines) == len(paths)
        return [(int(line.split(" ")[0]), line.partition(" ")[2]) for line in lines]

    return run


def sections_of(data: bytes) -> dict[str, tuple[int, int]]:
    """Offset and length of each section of a good file."""
    n, at = struct.unpack_from("<IQ", data, len(data) - fmt.TRAILER.size + 12)
    records = fmt.SECTION.iter_unpack(data[at : at + n * fmt.SECTION.size])
    return {name.rstrip(b"\0").decode(): (offset, n_bytes) for name, offset, n_bytes, _ in records}


def with_directory(data: bytes, change: Callable[[list[list[object]]], object]) -> bytes:
    """The file with other directory entries [name, offset, n_bytes, sha256], and a trailer that fits them."""
    n, at = struct.unpack_from("<IQ", data, len(data) - fmt.TRAILER.size + 12)
    entries: list[list[object]] = [list(r) for r in fmt.SECTION.iter_unpack(data[at : at + n * fmt.SECTION.size])]
    change(entries)
    return data[:at] + toy.pack_end(b"".join(fmt.SECTION.pack(*entry) for entry in entries), at)


def test_a_good_file_opens(openings: Openings, good: bytes) -> None:
    assert openings([good]) == [(OK, "")]


def test_truncated_files_are_refused_at_every_interesting_length(openings: Openings, good: bytes) -> None:
    edges = {0, 1, 63, 64, 65, len(good) - 64, len(good) - 128}
    for offset, n_bytes in sections_of(good).values():
        edges |= {offset, offset + n_bytes}
    lengths = sorted({edge + d for edge in edges for d in (-1, 0, 1) if 0 <= edge + d < len(good)})
    for length, (status, fact) in zip(lengths, openings(good[:n] for n in lengths), strict=True):
        assert status == FORMAT, (length, fact)
        assert "truncated" in fact or "empty" in fact, (length, fact)


def test_a_file_cut_in_the_middle_says_how_much_is_missing(openings: Openings, good: bytes) -> None:
    [(status, fact)] = openings([good[:100] + good[200:]])
    assert (status, fact) == (
        FORMAT,
        f"the artifact is truncated: {len(good) - 100} bytes, the trailer says {len(good)}",
    )


def test_a_flipped_byte_in_any_section_is_named(openings: Openings, good: bytes) -> None:
    places = {name: range_ for name, range_ in sections_of(good).items() if name != "weights"}
    files = []
    for offset, n_bytes in places.values():
        data = bytearray(good)
        data[offset + n_bytes // 2] ^= 1
        files.append(bytes(data))
    facts = [fact for _, fact in openings(files)]
    assert facts == [f"section '{name}' is damaged (its SHA-256 differs)" for name in places]


def test_weights_are_not_read_at_open(openings: Openings, good: bytes) -> None:
    data = bytearray(good)
    data[sections_of(good)["weights"][0]] ^= 1
    assert openings([bytes(data)]) == [(OK, "")]


def test_hostile_trailers_are_refused(openings: Openings, good: bytes) -> None:
    n, at = struct.unpack_from("<IQ", good, len(good) - fmt.TRAILER.size + 12)
    directory = good[at : at + n * fmt.SECTION.size]
    wild = (0, 1, 2**31, 2**32 - 1)
    wide = (0, 1, at - 64, at + 64, len(good), 2**63, 2**64 - 1, 2**64 - at)
    files = [good[:at] + toy.pack_end(directory, at, n_sections=value) for value in (*wild, n - 1, n + 1, 65)]
    files += [good[:at] + toy.pack_end(directory, at, offset=value) for value in wide]
    files += [good[:at] + toy.pack_end(directory, at, file_bytes=value) for value in wide if value != len(good)]
    files += [good[:at] + toy.pack_end(directory, at, version=value) for value in (0, 1, 2, 10, 2**32 - 1)]
    files += [good[:at] + toy.pack_end(directory, at, magic=b"LLMCART0"), b"\0" * 4096, b"\xff" * 64]
    files += [good[:at] + toy.pack_end(directory, at, sha256=bytes(32))]
    assert [status for status, _ in openings(files)] == [FORMAT] * len(files)


def test_a_new_format_is_named(openings: Openings, good: bytes) -> None:
    n, at = struct.unpack_from("<IQ", good, len(good) - fmt.TRAILER.size + 12)
    [(_, fact)] = openings([good[:at] + toy.pack_end(good[at : at + n * fmt.SECTION.size], at, version=10)])
    assert fact == "the artifact has format version 10; its runtime reads 3 to 9"


def test_hostile_directories_are_refused(openings: Openings, good: bytes) -> None:
    changes: list[Callable[[list[list[object]]], object]] = []
    for index in range(5):
        for field in (1, 2):
            for value in (1, 64, 4096, 2**20, 2**63, 2**64 - 64, 2**64 - 1):
                changes.append(lambda e, i=index, f=field, v=value: e[i].__setitem__(f, v))  # type: ignore[misc]
        for name in (b"", b"x" * 16, b"a\0b", b"plan", b"code"):
            changes.append(lambda e, i=index, n=name: e[i].__setitem__(0, n))  # type: ignore[misc]
        changes.append(lambda e, i=index: e.pop(i))  # type: ignore[misc]
    changes += [lambda e: e.clear(), lambda e: e.reverse(), lambda e: e.extend(e * 20), lambda e: e.append(e[-1])]
    results = openings(with_directory(good, change) for change in changes)
    unchanged = {"", "the plan names 0 kernels"}
    assert {status for status, _ in results} <= {OK, FORMAT}
    for status, fact in results:
        assert (status == OK) == (fact in unchanged), (status, fact)


def test_missing_sections_are_named(openings: Openings) -> None:
    files = []
    for name in ("code", "weights", "plan"):
        sections = toy.toy_sections()
        del sections[name]
        files.append(toy.pack_sections(sections))
    facts = [fact for _, fact in openings(files)]
    assert facts[0].startswith("the directory is damaged: section 'weights' is not the code")
    assert facts[1:] == ["the artifact has no section 'weights'", "the artifact has no section 'plan'"]


def hostile_plans() -> Iterable[bytes]:
    """Plan sections with one field spoiled each."""
    wild = (0, 1, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
    for field in ("n_vocab", "n_context", "page_tokens", "pages_per_sequence"):
        yield from (toy.ToyPlan().pack(**{field: value}) for value in (0, 2**31, 2**32 - 1))
    for field in ("n_kernels", "n_plans", "n_calls", "n_arguments"):
        yield from (toy.ToyPlan().pack(**{field: value}) for value in wild)
    for field in ("kv_page_bytes", "arena_bytes", "scratch_bytes"):
        yield from (toy.ToyPlan().pack(**{field: value}) for value in (0, 1, 63, 2**63, 2**64 - 1))
    for table, fields in (("plans", 4), ("calls", 4)):
        for index in range(len(getattr(toy.ToyPlan(), table))):
            for field_index in range(fields):
                for value in wild:
                    plan = toy.ToyPlan()
                    record = list(getattr(plan, table)[index])
                    if record[field_index] != value:
                        record[field_index] = value
                        getattr(plan, table)[index] = tuple(record)
                        yield plan.pack()
    for index in range(len(toy.ToyPlan().arguments)):
        for offset, n_bytes in ((2**64 - 1, 1), (2**64 - 64, 128), (0, 2**64 - 1), (1, 0), (2**40, 0), (64, 2**20)):
            plan = toy.ToyPlan()
            plan.arguments[index] = (plan.arguments[index][0], offset, n_bytes)
            yield plan.pack()


def test_hostile_plans_are_refused_or_harmless(openings: Openings) -> None:
    """A smaller grid or a cut list of calls is a wrong model, but no danger; nothing may point outside its space."""
    results = openings(toy.pack_sections(toy.toy_sections(plan=plan)) for plan in hostile_plans())
    assert {status for status, _ in results} <= {OK, FORMAT, MEMORY}
    assert sum(status == FORMAT for status, _ in results) > 0.8 * len(results)


def test_every_hostile_argument_is_refused(openings: Openings) -> None:
    def plans() -> Iterable[bytes]:
        for index in range(len(toy.ToyPlan().arguments)):
            for change in ((2**64 - 1, 1), (2**64 - 64, 128), (0, 2**64 - 1), (1, 0), (2**40, 0), (64, 2**20)):
                plan = toy.ToyPlan()
                plan.arguments[index] = (plan.arguments[index][0], *change)
                yield plan.pack()

    for status, fact in openings(toy.pack_sections(toy.toy_sections(plan=plan)) for plan in plans()):
        assert status == FORMAT
        assert "is not in the" in fact or "which is not aligned" in fact


def test_other_kernels_than_the_plan_names_are_refused(openings: Openings) -> None:
    renamed, counted, fewer = toy.ToyPlan(), toy.ToyPlan(), toy.ToyPlan()
    renamed.kernels[1] = ("stone_2", renamed.kernels[1][1])
    counted.kernels[1] = (counted.kernels[1][0], 9)
    fewer.kernels.pop()
    sections = [toy.toy_sections(plan=plan.pack()) for plan in (renamed, counted, fewer)]
    facts = [fact for _, fact in openings(map(toy.pack_sections, sections))]
    assert facts[0] == "kernel 1 of the plan is 'stone_2' with 4 pointers; the code has 'store_2' with 4"
    assert facts[1] == "kernel 1 of the plan is 'store_2' with 9 pointers; the code has 'store_2' with 4"
    assert facts[2].startswith("the plan names 15 kernels, the code has 16")


def test_hostile_second_programs_are_refused_or_not_looked_at(openings: Openings) -> None:
    good = toy.ToyPlan().pack()
    seconds = [b"", good[:119], good[:-1], *(toy.ToyPlan().pack(n_kernels=n) for n in (0, 1, 2**31, 2**32 - 1)), good]
    files = [toy.pack_sections(toy.toy_sections(**{"plan.1": second})) for second in seconds]
    results = openings(files)
    assert [status for status, _ in results] == [OK, OK, FORMAT, OK, FORMAT, FORMAT, FORMAT, FORMAT]
    assert results[-2][1] == "the plan names 4294967311 kernels, the code has 16"
    first = toy.ToyPlan().pack(cpu_features=1 << 31)
    spoiled = [toy.pack_sections(toy.toy_sections(**{"plan": first, "plan.1": second})) for second in seconds]
    assert {status for status, _ in openings(spoiled)} == {FORMAT}


def test_an_artifact_for_another_machine_is_refused(openings: Openings) -> None:
    plan = toy.ToyPlan().pack(cpu_features=1 << 31)
    [(status, fact)] = openings([toy.pack_sections(toy.toy_sections(plan=plan))])
    assert status == TARGET
    assert fact == "this artifact needs the CPU feature unknown bit 31, which this machine lacks"


def test_hostile_vocabularies_are_refused(openings: Openings) -> None:
    vocabularies = [b"", b"\0" * 7, struct.pack("<2I", 1, 0), struct.pack("<I", 2**32 - 1) + b"\0" * 100]
    vocabularies += [struct.pack("<4I", 2, 0, 5, 3) + b"abcde", struct.pack("<3I", 1, 0, 9) + b"abc"]
    results = openings(toy.pack_sections(toy.toy_sections(vocabulary=v)) for v in vocabularies)
    assert all(status == FORMAT and "vocabulary" in fact for status, fact in results)


def test_random_flips_behind_good_hashes_never_crash(openings: Openings) -> None:
    """The plan and the vocabulary, changed at random but hashed again, so that the checks behind the hash are met; half
    of the plans say all that there is to say."""
    chance = random.Random(7)

    def spoiled(name: str) -> bytes:
        full = {"plan": toy.FullPlan().pack()} if chance.random() < 0.5 else {}
        data = bytearray(toy.toy_sections(**full)[name])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at] = chance.choice([data[at] ^ 1 << chance.randrange(8), 0, 0xFF, chance.randrange(256)])
        return toy.pack_sections(toy.toy_sections(**{name: bytes(data)}))

    results = openings(spoiled("plan" if i % 4 else "vocabulary") for i in range(400))
    assert {status for status, _ in results} <= {OK, FORMAT, TARGET, MEMORY}
    assert sum(status == OK for status, _ in results) < 200


def test_random_flips_in_directory_and_trailer_never_crash(openings: Openings, good: bytes) -> None:
    chance = random.Random(8)
    n, at = struct.unpack_from("<IQ", good, len(good) - fmt.TRAILER.size + 12)
    end = at + n * fmt.SECTION.size

    def spoiled() -> bytes:
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(at, len(data) - 32)] ^= 1 << chance.randrange(8)
        data[-32:] = hashlib.sha256(data[at:end]).digest()
        return bytes(data)

    results = openings(spoiled() for _ in range(300))
    assert {status for status, _ in results} <= {OK, FORMAT}

"""Reading an artifact: what is there is given back, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest

from llmc.runtime import ArtifactFile, LlmcError
from llmc.runtime import format as fmt
from tests.runtime.stub_artifact import (
    KERNELS,
    WEIGHTS,
    manifest,
    pack,
    plan_section,
    stub_sections,
    tokenizer_json,
    write_stub,
)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    return write_stub(tmp_path / "stub.so")


def refusal(path: Path) -> LlmcError:
    with pytest.raises(LlmcError) as refused:
        read_all(path)
    return refused.value


def read_all(path: Path) -> set[str]:
    with ArtifactFile.open(path) as file:
        file.check_weights()
        file.plan()
        file.manifest()
        return set(file.sections)


def test_sections_come_back_as_they_were_written(stub: Path) -> None:
    with ArtifactFile.open(stub) as file:
        assert file.manifest() == manifest()
        assert file.section("weights") == WEIGHTS
        assert file.tokenizer_json() == tokenizer_json()
        assert (file.graph() or {})["passes"][1]["name"] == "fuse_norm"
        assert file.n_bytes == stub.stat().st_size


def test_optional_sections_may_be_absent(tmp_path: Path) -> None:
    with ArtifactFile.open(write_stub(tmp_path / "a.so", tokenizer=None, graph=None, vocabulary=None)) as file:
        assert file.tokenizer_json() is None
        assert file.graph() is None


def test_weights_are_hashed_on_request_with_progress(stub: Path) -> None:
    seen: list[tuple[int, int]] = []
    with ArtifactFile.open(stub) as file:
        file.check_weights(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))


def test_plan_tables_refer_to_each_other(stub: Path) -> None:
    with ArtifactFile.open(stub) as file:
        tables = file.plan()
    assert [kernel.name for kernel in tables.kernels] == list(KERNELS)
    assert [(plan.kind, plan.n_rows) for plan in tables.plans] == [(0, 1), (0, 8), (1, 1)]
    (call,) = tables.calls_of(tables.plans[2])
    assert [fmt.SPACES[argument.space] for argument in tables.arguments_of(call)] == ["arena", "weights", "logits"]
    assert tables.cpu_features == ("avx2", "fma")


def test_the_page_about_artifacts_names_every_space() -> None:
    page = (Path(__file__).parents[2] / "docs" / "artifact.md").read_text(encoding="utf-8")
    table = page.partition("| space |")[2].partition("\n\n")[0].splitlines()[2:]
    names = [name for line in table for name in line.split("|")[1].strip().split(", ")]
    assert sorted(names) == sorted(fmt.SPACES)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.so").fact == "no such file"
    assert refusal(tmp_path).fact == "this is a directory, not an artifact"
    assert refusal(tmp_path / "none.so").place == str(tmp_path / "none.so")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").fact == "this is no regular file, not an artifact"


def test_a_file_that_the_system_does_not_read_is_named() -> None:
    error = refusal(Path("/proc/self/mem"))  # whose first page nobody has
    assert error.fact.startswith("the artifact cannot be read: ")
    assert error.place == "/proc/self/mem"


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF" + bytes(5000), bytes(64)])
def test_another_file_is_not_an_artifact(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.so").write_bytes(content)
    assert refusal(tmp_path / "a.so").fact == "this is not an artifact"


def test_a_truncated_artifact_is_called_so(stub: Path) -> None:
    data = stub.read_bytes()
    stub.write_bytes(data[: len(data) - 1000])
    assert refusal(stub).fact == "the artifact is truncated or stripped: its end is missing"


def test_bytes_cut_from_the_middle_are_noticed(stub: Path) -> None:
    data = stub.read_bytes()
    stub.write_bytes(data[:20000] + data[24096:])
    assert "truncated" in refusal(stub).fact


def test_another_format_version_is_named(stub: Path) -> None:
    data = bytearray(stub.read_bytes())
    data[-fmt.TRAILER.size + 8] = 10
    stub.write_bytes(data)
    assert refusal(stub).fact == "the artifact has format version 10; this llmc reads versions 3 to 9"


@pytest.mark.parametrize("name", ["code", "weights", "plan", "vocabulary", "tokenizer", "graph", "manifest"])
def test_a_flipped_byte_is_traced_to_its_section(stub: Path, name: str) -> None:
    with ArtifactFile.open(stub) as file:
        section = file.sections[name]
    data = bytearray(stub.read_bytes())
    data[section.offset + section.n_bytes // 2] ^= 1
    stub.write_bytes(data)
    assert refusal(stub).fact == f"the artifact is damaged: section '{name}' is not what was written"


@pytest.mark.parametrize("seed", range(60))
def test_noise_in_trailer_and_directory_gives_an_error_not_a_crash(stub: Path, seed: int) -> None:
    rng, data = random.Random(seed), bytearray(stub.read_bytes())
    n_sections = 7 * fmt.SECTION.size
    at = len(data) - rng.randrange(1, fmt.TRAILER.size + n_sections)
    data[at] ^= rng.randrange(1, 256)
    if at < len(data) - fmt.TRAILER.size:  # as an attacker would: with a hash that fits
        directory = bytes(data[-fmt.TRAILER.size - n_sections : -fmt.TRAILER.size])
        data[-32:] = hashlib.sha256(directory).digest()
    stub.write_bytes(data)
    try:
        names = read_all(stub)
    except LlmcError:
        return
    assert names != set(stub_sections())  # the name of an optional section was all that changed


def test_a_section_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so")
    data = bytearray(path.read_bytes())
    at = len(data) - fmt.TRAILER.size - fmt.SECTION.size
    data[at + 24 : at + 32] = (1 << 60).to_bytes(8, "little")
    data[-32:] = hashlib.sha256(data[-fmt.TRAILER.size - 7 * fmt.SECTION.size : -fmt.TRAILER.size]).digest()
    path.write_bytes(data)
    assert "outside the file" in refusal(path).fact


def test_a_manifest_that_is_no_json_object_is_damage(tmp_path: Path) -> None:
    for text in ("[]", "{", "[" * 100000, "\ud800".encode("utf-8", "surrogatepass")):
        path = pack(tmp_path / "a.so", stub_sections(manifest=text))
        assert refusal(path).fact == "the artifact is damaged: section 'manifest' is not what was written"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_kernels": 1}, "its tables take"),
        ({"n_calls": 1 << 31}, "its tables take"),
        ({"arena_bytes": 32}, "call 0 of embed points outside its memory"),
        ({"n_vocab": 8}, "call 2 of linear_64x64 points outside its memory"),
        ({"n_vocab": 0}, "vocabulary of 0"),
        ({"page_tokens": 0}, "1 pages of 0"),
        ({"pages_per_sequence": 2}, "2 pages of 64"),
    ],
)
def test_a_plan_header_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write_stub(tmp_path / "a.so", plan=plan_section(**changes))
    assert refusal(path).fact.startswith(f"the plan section is not valid: {said}")


@pytest.mark.parametrize("seed", range(100))
def test_noise_in_the_plan_never_crashes(tmp_path: Path, seed: int) -> None:
    rng, data = random.Random(seed), bytearray(plan_section())
    for _ in range(3):
        data[rng.randrange(len(data))] = rng.randrange(256)
    with ArtifactFile.open(write_stub(tmp_path / "a.so", plan=bytes(data))) as file:
        try:
            tables = file.plan()
        except LlmcError:
            return
        assert all(call.kernel < len(tables.kernels) for plan in tables.plans for call in tables.calls_of(plan))


def test_a_section_that_is_not_there_is_named(stub: Path) -> None:
    with ArtifactFile.open(stub) as file, pytest.raises(LlmcError, match="no section 'nothing'"):
        file.section("nothing")

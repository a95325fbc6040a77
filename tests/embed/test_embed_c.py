"""The programs in examples/embed/c: built as they say, they print what the model says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.runtime import toy_artifact as toy
from tests.runtime.toy_model import Model

EXAMPLES = Path(__file__).parents[2] / "examples" / "embed" / "c"
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
PROMPT = (3, 1, 4, 1, 5)
N_TOKENS = 12


def expected_text(artifact: Path) -> bytes:
    """What the model says after PROMPT, greedily, token by token."""
    with Model(artifact) as model:
        sequence, said = model.sequence(PROMPT), b""
        for _ in range(N_TOKENS):
            token = sequence.sample()
            if model.api.is_eos(model.handle, token):
                break
            said += model.text(token)
            sequence.feed([token])
        return said + b"\n"


def build(folder: Path, name: str, *flags: str | Path) -> Path:
    """Compile an example in `folder`, as its first lines say."""
    program = folder / "generate"
    include = f"-I{toy.RUNTIME}/include"
    command = ["cc", *WARNINGS, EXAMPLES / name, include, *flags, "-ldl", "-o", program]
    subprocess.run(command, cwd=folder, check=True)
    return program


def run(folder: Path, program: Path, *arguments: str) -> bytes:
    ids = ",".join(map(str, PROMPT))
    done = subprocess.run([program, *arguments, str(N_TOKENS), ids], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("flags", [(), SANITIZED], ids=["plain", "sanitized"])
def test_a_program_opens_an_artifact_with_dlopen(artifact: Path, tmp_path: Path, flags: Sequence[str]) -> None:
    program = build(tmp_path, "generate_dlopen.c", *flags)
    assert run(tmp_path, program, str(artifact)) == expected_text(artifact)


@pytest.mark.parametrize("flags", [(), SANITIZED], ids=["plain", "sanitized"])
def test_a_program_links_an_artifact(artifact: Path, tmp_path: Path, flags: Sequence[str]) -> None:
    os.symlink(artifact, tmp_path / "model.so")
    program = build(tmp_path, "generate_linked.c", "./model.so", *flags)
    assert run(tmp_path, program) == expected_text(artifact)


def test_the_artifact_itself_may_be_sanitized(tmp_path: Path) -> None:
    sanitized, plain = tmp_path / "sanitized", tmp_path / "plain"
    sanitized.mkdir()
    plain.mkdir()
    toy.build_artifact(sanitized, *SANITIZED)
    program = build(sanitized, "generate_dlopen.c", *SANITIZED)
    assert run(sanitized, program, "./toy.so") == expected_text(toy.build_artifact(plain))


def test_a_program_reports_what_the_runtime_says(artifact: Path, tmp_path: Path) -> None:
    program = build(tmp_path, "generate_dlopen.c")
    done = subprocess.run([program, artifact, "1", "-7"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: token -7 is out of range")


def test_examples_stay_short() -> None:
    for source in EXAMPLES.glob("*.c"):
        assert len(source.read_text().splitlines()) < 60

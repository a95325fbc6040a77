"""The runtime as C: clean under strict compilers, one exported symbol, nothing but libc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler.link import runtime_sources
from tests.runtime import toy_artifact as toy

COMPILERS = {"cc": ["cc"], "zig": [sys.executable, "-m", "ziglang", "cc"]}
HEADER = toy.RUNTIME / "include" / "llmc.h"


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_runtime_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    code = toy.compile_c(tmp_path / "a.so", toy.toy_sources(tmp_path), "-O2", "-shared", compiler=COMPILERS[compiler])
    assert code.stat().st_size > 0


@pytest.mark.parametrize("standard", ["-std=c99", "-std=c11", "-xc++ -std=c++17"])
def test_the_header_stands_alone(standard: str, tmp_path: Path) -> None:
    source = tmp_path / "app.c"
    source.write_text(f'#include "{HEADER}"\nllmc_get_api_function get_api = llmc_get_api;\n')
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    subprocess.run([*COMPILERS["cc"], *standard.split(), *flags, source], check=True)


def test_one_symbol_is_exported_and_only_libc_is_needed(toy_so: Path) -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", toy_so], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["llmc_get_api"]
    needed = subprocess.run(["readelf", "-d", toy_so], capture_output=True, text=True, check=True).stdout
    libraries = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line}
    assert libraries <= {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}


def test_the_runtime_never_prints_exits_or_keeps_state(tmp_path: Path) -> None:
    objects = []
    for source in runtime_sources():
        objects.append(tmp_path / f"{source.stem}.o")
        toy.compile_c(objects[-1], [source], "-O2", "-c")
    symbols = subprocess.run(["nm", *objects], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in symbols.splitlines() if " U " in line}
    assert not names & {"exit", "_exit", "abort", "printf", "puts", "fputs", "fprintf", "putchar", "perror", "write"}
    state = [line.split() for line in symbols.splitlines() if line[17:18] in ("b", "B", "d", "D", "C")]
    assert [name for _, kind, name in state if kind.lower() != "d" or name not in RELOCATED] == ["text"]


RELOCATED = {"API", "NAMES", "SPACE_NAMES", "cpu_device", "cuda_device"}
"""Constant tables of pointers."""

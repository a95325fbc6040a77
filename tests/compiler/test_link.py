"""compiler/link.py"""

import subprocess
import sys
from pathlib import Path

import pytest

from llmc.compiler import link
from llmc.runtime.errors import LlmcError


def test_the_c_compiler_named_by_cc_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc -m64")
    assert link.c_compiler() == ["gcc", "-m64"]


def test_a_compiler_that_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LlmcError, match="'no-such-compiler' was not found"):
        link.c_compiler()


def test_without_a_c_compiler_zig_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert link.c_compiler() == [sys.executable, "-m", "ziglang", "cc"]


def test_without_any_compiler_the_hint_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlmcError) as caught:
        link.c_compiler()
    assert "gcc" in str(caught.value)
    assert "ziglang" in str(caught.value)


def test_kernel_table_lists_kernels_in_the_plans_order() -> None:
    text = link.kernel_table([("k_b", 3), ("k_a", 2)])
    assert text.index('{"k_b", k_b, 3u}') < text.index('{"k_a", k_a, 2u}')
    assert "llmc_kernel_count = 2u" in text


def test_a_failed_compile_says_what_the_compiler_said(tmp_path: Path) -> None:
    (tmp_path / "bad.c").write_text("int f( {\n")
    with pytest.raises(LlmcError, match=r"the C compiler failed: bad\.c:1"):
        link.run([*link.c_compiler(), "-c", "bad.c"], tmp_path)


def test_a_full_temporary_folder_is_named(tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'ld: final close failed: No space left on device' >&2\nexit 1\n")
    script.chmod(0o755)
    with (
        pytest.raises(LlmcError, match="temporary files: No space left on device") as caught,
        link.work_folder() as work,
    ):
        link.run([str(script)], work)
    assert "TMPDIR" in str(caught.value.hint)


def test_without_kernels_of_a_cpu_an_artifact_needs_libc_alone(tmp_path: Path) -> None:
    (tmp_path / "code.so").write_bytes(link.link([], [], None))
    said = subprocess.run(["readelf", "-d", tmp_path / "code.so"], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in said.splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}  # glibc, its loader

"""The `llmc` command: help, exit codes, the words of a failure, and what starting it costs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import llmc
from llmc import __version__
from llmc.cli import opening
from llmc.cli.help_page import help_page
from llmc.cli.main import COMMANDS, main
from llmc.runtime.errors import LlmcError
from tests.runtime.stub_artifact import write_stub

COMMAND = [sys.executable, "-c", "from llmc.cli.main import main; main(prog_name='llmc')"]
HEAVY = ("torch", "tvm", "onnx", "onnx_ir", "onnxruntime", "transformers")


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and words of a command whose work raises this."""

    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(opening, "load", load)
    result = CliRunner().invoke(main, ["run", "a.so", "-p", "x"])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert all(f"  {name} " in result.output for name in COMMANDS)


def test_version_is_the_packages() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"llmc {__version__}\n"


def test_an_interpreter_has_the_command_and_the_face_of_the_package() -> None:
    said = subprocess.run([sys.executable, "-m", "llmc", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"llmc {__version__}\n"
    assert {"LlmcError", "compile", "load"} <= set(dir(llmc))
    assert llmc.LlmcError is LlmcError
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        getattr(llmc, "l" + "od")


def test_the_help_in_the_docs_is_the_help() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == help_page(), "run: python -m llmc.cli.help_page > docs/cli.md"


@pytest.mark.parametrize("arguments", [["nothing"], ["run"], ["run", "a.so", "--frob"], ["compile"], ["inspect"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_failed_request_says_fact_place_and_hint_and_ends_with_1(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "none.so")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: no such file\n  at: {tmp_path}/none.so\n  hint: give the artifact.so that llmc compile wrote\n"
    )


def test_an_unexpected_failure_is_one_line_and_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMC_TRACEBACK", raising=False)
    code, said = fail_with(ZeroDivisionError("division by zero\nmore"), monkeypatch)
    assert code == 1
    assert said.splitlines()[0] == "error: unexpected ZeroDivisionError: division by zero"
    assert "LLMC_TRACEBACK=1" in said
    assert "Traceback" not in said


def test_what_the_machine_refuses_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    full = fail_with(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), monkeypatch)
    assert full == (1, "error: the system refuses: No space left on device\n  at: /tmp/x\n")
    lacks = "libtorch_python.so: failed to map segment from shared object"
    for error in (MemoryError(), RuntimeError("std::bad_alloc"), ImportError(lacks)):
        code, said = fail_with(error, monkeypatch)
        assert (code, said.splitlines()[0]) == (1, "error: this machine has not enough memory")


def test_the_traceback_is_shown_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_TRACEBACK", "1")
    code, said = fail_with(ZeroDivisionError("division by zero"), monkeypatch)
    assert code == 1
    assert "Traceback" in said


def test_ctrl_c_ends_with_130_and_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fail_with(KeyboardInterrupt(), monkeypatch) == (130, "")


def test_a_usage_error_found_late_is_still_2(monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = fail_with(click.UsageError("late"), monkeypatch)
    assert code == 2
    assert "Error: late" in said


def test_a_closed_pipe_is_no_news(tmp_path: Path) -> None:
    path = write_stub(tmp_path / "a.so", manifest={"long": "x" * 1_000_000})
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    with reader:
        result = subprocess.run(
            [*COMMAND, "inspect", path, "--manifest"], stdout=reader.stdin, stderr=subprocess.PIPE, text=True
        )
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--help"], ["inspect", "a.so", "--manifest"]])
def test_a_full_disk_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    write_stub(tmp_path / "a.so")
    for unbuffered in ("", "1"):
        how: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
        with open("/dev/full", "w") as full:
            result = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, **how)
        assert (result.returncode, result.stderr) == (1, f"error: the system refuses: {os.strerror(errno.ENOSPC)}\n")


def test_closed_streams_are_empty(tmp_path: Path) -> None:
    """And no file takes their place: here the artifact would be standard input."""
    path = write_stub(tmp_path / "a.so")
    said = "import os, sys; os._exit(sum(os.fstat(n).st_rdev == os.stat('/dev/null').st_rdev for n in range(3)))"
    code = f"from llmc.cli.main import main\nmain(['inspect', {str(path)!r}], standalone_mode=False)\n{said}"
    shell = [*("sh", "-c", '"$@" <&- >&- 2>&-', "sh"), sys.executable, "-c", code]
    assert subprocess.run(shell, check=False).returncode == 3


@pytest.mark.parametrize(
    "command", ["--help", "run a.so -p Once", "inspect a.so", "verify a.so", "serve none.so --port 0"]
)
def test_only_compile_imports_the_compiler(tmp_path: Path, command: str) -> None:
    write_stub(tmp_path / "a.so")
    code = (
        "import sys\nfrom llmc.cli.main import main\n"
        f"main({command.split()!r}, standalone_mode=False)\n"
        f"heavy = [m for m in sys.modules if m.split('.')[0] in {HEAVY} or m.startswith('llmc.compiler')]\n"
        "print(heavy, file=sys.stderr)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stderr.splitlines()[-1] == "[]"

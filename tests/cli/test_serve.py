"""`llmc serve` as a command: what keeps it from serving is one line."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmc.cli.main import main
from tests.runtime.stub_artifact import write_stub


def serve(artifact: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["serve", str(artifact), *map(str, arguments)])


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = serve(write_stub(tmp_path / "a.so"), "--port", port)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: cannot listen: Address already in use\n  at: 127.0.0.1:{port}\n"
        "  hint: stop what uses it, or give another --port; 0 takes a free one\n"
    )


def test_an_address_of_another_machine_is_named(tmp_path: Path) -> None:
    result = serve(write_stub(tmp_path / "a.so"), "--host", "203.0.113.1", "--port", 0)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[1:] == [
        "  at: 203.0.113.1:0",
        "  hint: give an address of this machine, or --host 0.0.0.0 for all that it has",
    ]


def test_an_address_that_is_none_is_named(tmp_path: Path) -> None:
    result = serve(write_stub(tmp_path / "a.so"), "--host", "no.such.host.invalid")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no address 'no.such.host.invalid'")


def test_a_file_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.write_text("no")
    result = serve(path, "--port", 0)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[:2] == ["error: this is not an artifact", f"  at: {path}"]


def test_texts_that_cannot_be_kept_are_named_before_anybody_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = serve(write_stub(tmp_path / "a.so"), "--port", 0, "--prompt-cache", tmp_path / "file")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: this folder cannot be made: File exists\n  at: {tmp_path / 'file'}\n"


def test_an_empty_name_is_no_place_to_keep_texts(tmp_path: Path) -> None:
    result = serve(write_stub(tmp_path / "a.so"), "--port", 0, "--prompt-cache", "")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: this is no path\n  at: ''\n"


@pytest.mark.parametrize("package", ["jinja2", "starlette", "uvicorn"])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "llmc.runtime.serve.server", raising=False)
    result = serve(tmp_path / "a.so")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: serving needs the Python package {package}, which is not installed\n"
        "  hint: pip install 'llmc[serve]'\n"
    )


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--max-batch", "0"], ["--queue", "-1"], ["--api-key", ""]])
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: list[str]) -> None:
    assert serve(tmp_path / "a.so", *arguments).exit_code == 2

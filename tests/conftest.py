"""Shared fixtures. `pytest --update-golden` rewrites tests/golden."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    """Exported graphs and compiled kernels are kept in build/cache: from run to run, and for all processes of a run.

    An entry is used only for the very sources and versions it was made from.

    A shell starts what it runs in the background with Ctrl-C ignored; tests of Ctrl-C, and the processes that they
    start, need Python's own way back.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("LLMC_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """Compare text with tests/golden/<test file>/<test name>.txt."""
    path = GOLDEN / request.path.relative_to(Path(__file__).parent).with_suffix("") / f"{request.node.name}.txt"

    def check(text: object) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
        assert path.exists(), f"no golden file {path}; run: pytest --update-golden"
        assert f"{text}\n" == path.read_text(encoding="utf-8")

    return check

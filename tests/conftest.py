"""Shared fixtures. `pytest --update-golden` rewrites tests/golden."""

import copy
import functools
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.schedules import cache

GOLDEN = Path(__file__).parent / "golden"
BY_PARAMETER = (
    "tests/passes/test_pipeline.py",
    "tests/test_company.py",
    "tests/test_given.py",
    "tests/test_parity.py",
)
"""Their fixtures compile a model for each parameter: tests of the same one run in the same process."""
TOGETHER = {
    "tests/cuda/test_whole_model.py": "a llama",
    "tests/runtime/test_c_damage.py": "host",
    "tests/runtime/test_c_host.py": "host",
    "tests/runtime/test_saved_damage.py": "host",
}
"""Files that share what takes long to make, in a cache or with each other."""
MANY = 1 << 30


def pytest_configure() -> None:
    """Exported graphs and compiled kernels are kept in build/cache: from run to run, and for all processes of a run.

    An entry is used only for the very sources and versions it was made from.

    A shell starts what it runs in the background with Ctrl-C ignored; tests of Ctrl-C, and the processes that they
    start, need Python's own way back.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("LLMC_CACHE", str(Path(__file__).parents[1] / "build" / "cache"))
    if "PYTEST_XDIST_WORKER" in os.environ:  # the processors are busy: others that compile would only load TVM too
        cache.KERNELS_PER_WORKER = MANY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_collection_finish() -> None:
    """PyTorch's exporter lists its operators for each model anew, which takes 0.3 s: here it does so once."""
    if "torch" not in sys.modules:
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listed = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(listed(opset_version))
        registry.functions = {name: list(functions) for name, functions in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign, assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test and its fixtures draw is the same alone and behind any others."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def group_of(test: str) -> str:
    """Of a test's id: what it shares with those that one process is to run."""
    file, _, name = test.partition("::")
    if file in BY_PARAMETER and "[" in name:
        return f"{file} {name.partition('[')[2]}"
    return TOGETHER.get(file) or (file if shares(file) else test)


@functools.cache
def shares(file: str) -> bool:
    """Whether tests of a file share what they make: two processes would make it twice, at the same time."""
    return 'scope="module"' in (Path(__file__).parents[1] / file).read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests one by one to whichever process is free, but for those of a group."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Scheduling(config, log)


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

"""Running kernels on NumPy arrays, on every level of this machine, with a cache of compiled kernels for the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llmc import schedules
from llmc.compiler.kernel import Call
from llmc.compiler.target import LEVELS, Target, host_features
from llmc.schedules.execute import Executable

LEVELS_HERE = [level for level, features in LEVELS.items() if host_features().issuperset(features)]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Array]]:
    """run(call, *inputs, target=…, n_tasks=…, kv=…): the call's outputs; each call is compiled once."""
    loaded: dict[tuple[Call, Target], Executable] = {}

    def execute(call: Call, *inputs: Array | None, target: Target, **options: Any) -> list[Array]:
        if (call, target) not in loaded:
            loaded[call, target] = Executable(call, schedules.implement(call, target), target)
        return loaded[call, target].run(*inputs, **options)

    return execute


@pytest.fixture(params=LEVELS_HERE)
def target(request: pytest.FixtureRequest) -> Target:
    """Each level that this machine can run."""
    return Target("cpu", request.param)


@pytest.fixture
def host() -> Target:
    """The highest level of this machine."""
    return Target("cpu", LEVELS_HERE[-1])

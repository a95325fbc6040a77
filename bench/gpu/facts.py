"""Does the driver open, does every function resolve, what is the device, and what else is on the machine?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from llmc.bench.gpu.driver import FUNCTIONS, Device
from llmc.bench.gpu.journal import last_line
from llmc.bench.gpu.kit import Kit

STAGE = "facts"
DEVICE, MACHINE = "device", "machine"
PACKAGES = ("numpy", "torch", "transformers", "triton")
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
BUSY = "clocks.sm,power.draw,temperature.gpu,clocks_throttle_reasons.active"
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nvidia-smi")


def items(kit: Kit) -> Iterator[str]:
    yield from (DEVICE, MACHINE)


def runner(device: Device, kit: Kit) -> Callable[[str], dict[str, Any]]:
    """run(item) -> facts; that there is a `device` already says that the driver opened."""

    def run(name: str) -> dict[str, Any]:
        if name == DEVICE:
            return {**device.facts(), "functions": len(FUNCTIONS)}
        return machine()

    return run


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "tools": {name: tool(name) for name in TOOLS},
        "driver": asked_of_smi("driver_version"),
        "clocks": asked_of_smi(CLOCKS),
        "cpus": len(os.sched_getaffinity(0)),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool(name: str) -> str | None:
    """What a program says of its version, last of all, or where it is; None: it is not there."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return path
    return last_line(said) or path


def asked_of_smi(fields: str) -> str | None:
    """As nvidia-smi says it: the driver's own interface knows no version but CUDA's, and no clock that is in use."""
    asked = smi(fields)
    return answered(asked) if asked else None


def smi(fields: str) -> subprocess.Popen[str] | None:
    """nvidia-smi, asked, for answered(); nothing where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def answered(asked: subprocess.Popen[str]) -> str | None:
    """The first line that it says."""
    try:
        said = asked.communicate(timeout=30)[0].strip()
    except subprocess.TimeoutExpired:
        asked.kill()
        asked.communicate()
        return None
    return said.splitlines()[0] if said and not asked.returncode else None

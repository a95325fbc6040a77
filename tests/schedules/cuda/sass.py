"""What is inside a cubin: registers, and how often each instruction stands there.

`cuobjdump` and `nvdisasm` come with the CUDA toolkit, and from PyPI with the `dev` extra.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?);")
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\$[\w$]+):")
_TARGET = re.compile(r"`\((\.L_x_\d+|\$[\w$]+)\)")
_ENDS = re.compile(r"(EXIT|RET|BRX|BRA(\.\w+)* +`)")
"""What follows is not reached, unless there is a condition in front, or behind as in BRA P0, …"""
_REGISTER = re.compile(r"\bR(\d+)\b")
_FROM_REGISTERS = re.compile(r"HGMMA\S* R\d+, R\d+, gdesc")
_USAGE = re.compile(r"REG:(\d+).*?STACK:(\d+).*?SHARED:(\d+)")


@dataclass(frozen=True)
class Sass:
    """One kernel's machine code.  listed: its instructions in order, with their modifiers ("LDG.E.128"); instructions:
    how often each stands there; text: as nvdisasm shows it."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    listed: tuple[str, ...]
    text: str

    @property
    def products_from_registers(self) -> int:
        """Products of warpgroups whose left matrix is in registers."""
        return len(_FROM_REGISTERS.findall(self.text))

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        return Counter(self.listed)

    def first(self, start: str) -> int:
        """Where an instruction whose name starts so stands first.  Raises StopIteration: nowhere."""
        return next(place for place, name in enumerate(self.listed) if name.startswith(start))

    def count(self, start: str) -> int:
        """Instructions whose name, at a dot or its end, starts so: count("LDG.E.128"), count("HGMMA")."""
        pattern = re.compile(re.escape(start) + r"(\.|$)")
        return sum(n for name, n in self.instructions.items() if pattern.match(name))

    def having(self, start: str, modifier: str) -> int:
        """Those of them that have this modifier: having("LDG", "128")."""
        return sum(
            n for name, n in self.instructions.items() if name.split(".")[0] == start and modifier in name.split(".")
        )


def read_sass(cubin: bytes) -> Sass:
    """Raises RuntimeError when the tools are missing: see `missing_tool`."""
    with tempfile.TemporaryDirectory(prefix="llmc-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _USAGE.search(_output("cuobjdump", "--dump-resource-usage", str(path)))
        text = _output("nvdisasm", "-c", str(path))
    assert usage, "cuobjdump says nothing about resources"
    registers, stack, shared = map(int, usage.groups())
    return Sass(registers, stack, shared, tuple(_INSTRUCTION.findall(text)), text)


def registers_behind(sass: Sass, start: str) -> int:
    """How many registers are named in what can be reached from the first instruction whose name starts so."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            code.append((found[1] or "", found[2]))
    reached: set[int] = set()
    ahead = [next(place for place, (_, text) in enumerate(code) if text.startswith(start))]
    while ahead:
        place = ahead.pop()
        if place in reached or place == len(code):
            continue
        reached.add(place)
        condition, text = code[place]
        ahead += [labels[name] for name in _TARGET.findall(text) if name in labels]
        if condition or not _ENDS.match(text):
            ahead.append(place + 1)
    return 1 + max((int(n) for place in reached for n in _REGISTER.findall(code[place][1])), default=-1)


def missing_tool() -> str:
    """Why SASS cannot be read here, or nothing."""
    return next((f"no {name}: make dev installs it" for name in ("cuobjdump", "nvdisasm") if not _tool(name)), "")


@functools.cache
def _tool(name: str) -> str | None:
    """On PATH, or where the packages of CUDA for Python put it."""
    folders = [str(Path(entry, "nvidia", "cu13", "bin")) for entry in sys.path]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def _output(name: str, *arguments: str) -> str:
    tool = _tool(name)
    if tool is None:
        raise RuntimeError(missing_tool())
    environment = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(tool).parent)])}
    answer = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, env=environment)
    return answer.stdout

"""Kernels with something taken away: what is left must not pass for right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from llmc.compiler.kernel import Implementation, Kernel
from llmc.schedules.cuda.compile import INCLUDE

Array = np.ndarray[Any, Any]

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_CALL = r"(?:\([^()]*(?:\([^()]*(?:\([^()]*\)[^()]*)*\)[^()]*)*\))"
SYNCHRONISING = re.compile(
    rf"(?:wait_for_previous|__syncthreads|__syncwarp|named_barrier|team_barrier<\w+>|fence_async_shared|mbarrier_wait|mbarrier_arrive|mbarrier_arrive_expect"
    rf"|mbarrier_arrive_in|cluster_arrive|cluster_wait"
    rf"|cp_async_wait<[^<>]*>|cp_async_commit|wgmma_fence|wgmma_commit|wgmma_wait<\d+>){_CALL};"
)
"""Statements that make threads, copies or products wait for each other."""

MACHINE = ("device.cuh", "bulk_copy.cuh", "wgmma.cuh")
"""Headers that say what the machine does, not what a kernel does."""


@dataclass(frozen=True)
class Mutant:
    """One statement of a header replaced.  `line` is the header's, from 1."""

    header: str
    line: int
    old: str
    new: str = ";"

    def __str__(self) -> str:
        return f"{self.header}:{self.line} {self.old} -> {self.new}"

    def of(self, implementation: Implementation) -> Implementation:
        """The implementation with this header changed in all its kernels."""
        launches = [replace(launch, kernel=self._kernel(launch.kernel)) for launch in implementation.launches]
        return replace(implementation, launches=tuple(launches))

    def _kernel(self, kernel: Kernel) -> Kernel:
        source = kernel.build()
        return (
            replace(kernel, key=f"{kernel.key} {self}", build=partial(inlined, source, self))
            if isinstance(source, str)
            else kernel
        )


def inlined(source: str, mutant: Mutant | None = None, seen: set[str] | None = None) -> str:
    """The source with the text of its headers in their place, one of them changed."""
    seen = set() if seen is None else seen

    def text(match: re.Match[str]) -> str:
        name = match[1]
        if name in MACHINE:
            return match[0]
        if name in seen:
            return ""
        seen.add(name)
        lines = (INCLUDE / name).read_text().split("\n")
        if mutant and mutant.header == name:
            assert mutant.old in lines[mutant.line - 1], f"{mutant}: the line is {lines[mutant.line - 1]!r}"
            lines[mutant.line - 1] = lines[mutant.line - 1].replace(mutant.old, mutant.new)
        return inlined("\n".join(line for line in lines if line != "#pragma once") + "\n", mutant, seen)

    return _INCLUDE.sub(text, source)


def headers(source: str) -> list[str]:
    """The headers that a source includes, themselves and through others."""
    seen: set[str] = set()
    inlined(source, None, seen)
    return sorted(seen)


def without_synchronisation(implementation: Implementation) -> Iterator[Mutant]:
    """For each synchronising statement in a header of the implementation's kernels, the mutant that lacks it."""
    sources = [launch.kernel.build() for launch in implementation.launches]
    for header in sorted({name for source in sources if isinstance(source, str) for name in headers(source)}):
        for number, line in enumerate((INCLUDE / header).read_text().split("\n"), 1):
            code = line.partition("//")[0]
            yield from (Mutant(header, number, found[0]) for found in SYNCHRONISING.finditer(code))

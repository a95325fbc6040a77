"""The machine an artifact is compiled for.

    cpu                    this machine
    cpu:x86-64-v3          AVX2 and FMA
    cpu:x86-64-v4          AVX-512 (F, BW, CD, DQ, VL)
    cpu:x86-64-v4+bf16     … and AVX512_BF16 and VNNI (Zen 4, Cooper Lake, Sapphire Rapids)

Levels are those of the x86-64 psABI.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.runtime.errors import LlmcError

V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
V4_BF16 = (*V4, "avx512_bf16", "avx512_vnni")
LEVELS = {"x86-64-v3": V3, "x86-64-v4": V4, "x86-64-v4+bf16": V4_BF16}


@dataclass(frozen=True)
class Target:
    """kind "cpu"; level, a key of LEVELS."""

    kind: str
    level: str

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features the artifact requires, by their names in /proc/cpuinfo."""
        return LEVELS[self.level]

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector register."""
        return 16 if self.has("avx512f") else 8

    def has(self, feature: str) -> bool:
        return feature in self.features

    def __str__(self) -> str:
        return f"{self.kind}:{self.level}"


def parse_target(text: str) -> Target:
    """The target a `--target` option names; "cpu" asks the machine."""
    kind, _, level = text.partition(":")
    if kind == "cuda":
        raise LlmcError("targets for NVIDIA GPUs are not built yet", place=f"--target {text}", hint="use --target cpu")
    if kind != "cpu" or (level and level not in LEVELS):
        known = ", ".join(["cpu", *(f"cpu:{name}" for name in LEVELS)])
        raise LlmcError(f"unknown target {text!r}", place="--target", hint=f"one of {known}")
    return Target("cpu", level or host_level())


def host_level() -> str:
    """The highest level this machine has."""
    flags = host_features()
    for level, features in reversed(LEVELS.items()):
        if flags.issuperset(features):
            return level
    missing = ", ".join(sorted(set(V3) - flags))
    raise LlmcError(f"this CPU lacks {missing}", place="--target cpu", hint="llmc needs x86-64-v3 (AVX2) or better")


def host_features() -> frozenset[str]:
    """CPU feature flags of this machine."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()

"""The machine an artifact is compiled for.

    cpu                    this machine
    cpu:x86-64-v3          AVX2 and FMA
    cpu:x86-64-v4          AVX-512 (F, BW, CD, DQ, VL)
    cpu:x86-64-v4+bf16     … and AVX512_BF16 and VNNI (Zen 4, Cooper Lake)
    cpu:x86-64-v4+amx      … and AMX with bf16 and int8 (Sapphire Rapids, Granite Rapids)
    cpu:aarch64            ARMv8.2 with dot products of bytes (Neoverse N1: Graviton 2, Ampere Altra; Apple M1)
    cpu:aarch64+i8mm       … and those of unsigned by signed bytes (Neoverse V1, V2: Graviton 3 and 4, Grace)
    cuda                   this machine's first NVIDIA GPU
    cuda:sm_90a            Hopper (H100, H200); sm_80 (A100, RTX 30), sm_89 (L40, RTX 40), sm_100a (B200),
                           sm_120 (RTX 50, RTX PRO, DGX Spark)

CPU levels are those of the x86-64 psABI, or named after ARM's extensions, GPU levels the architectures of NVIDIA's
compilers.  The code of an "a" level runs on exactly that architecture; others run on later ones of the same generation
too.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmc.runtime.errors import LlmcError

V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
V4_BF16 = (*V4, "avx512_bf16", "avx512_vnni")
V4_AMX = (*V4_BF16, "amx_bf16", "amx_int8", "amx_tile")
AARCH64 = ("asimd", "asimddp")
AARCH64_I8MM = (*AARCH64, "i8mm")
LEVELS = {
    "x86-64-v3": V3,
    "x86-64-v4": V4,
    "x86-64-v4+bf16": V4_BF16,
    "x86-64-v4+amx": V4_AMX,
    "aarch64": AARCH64,
    "aarch64+i8mm": AARCH64_I8MM,
}
AMX = frozenset(V4_AMX) - frozenset(V4_BF16)
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""For Linux on x86-64: the number of a system call, one of its requests, and the state component it is about."""
CPUINFO = Path("/proc/cpuinfo")
CUDA_LEVELS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")


@dataclass(frozen=True)
class Target:
    """kind "cpu" with a level of LEVELS, or kind "cuda" with one of CUDA_LEVELS."""

    kind: str
    level: str

    @property
    def features(self) -> tuple[str, ...]:
        """CPU features the artifact requires, by their names in /proc/cpuinfo; none for a GPU's."""
        return LEVELS.get(self.level, ())

    @property
    def arch(self) -> int:
        """Compute capability of a GPU, as 10 * major + minor."""
        return int(self.level.removeprefix("sm_").removesuffix("a"))

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector register; on ARM, which has twice as many registers as AVX2 of half the size, of
        two."""
        return 16 if self.has("avx512f") else 8

    @property
    def architecture(self) -> str:
        """The CPU's architecture: "x86_64" or "aarch64"; for a GPU that of this machine's CPU."""
        if self.kind == "cuda":
            return platform.machine()
        return "aarch64" if self.level.startswith("aarch64") else "x86_64"

    def has(self, feature: str) -> bool:
        return feature in self.features

    def __str__(self) -> str:
        return f"{self.kind}:{self.level}"


def parse_target(text: str) -> Target:
    """The target a `--target` option names; "cpu" asks the machine."""
    kind, _, level = text.partition(":")
    levels = {"cpu": tuple(LEVELS), "cuda": CUDA_LEVELS}.get(kind, ())
    if not levels or (level and level not in levels):
        known = ", ".join(["cpu", *(f"cpu:{name}" for name in LEVELS), "cuda", *(f"cuda:{n}" for n in CUDA_LEVELS)])
        raise LlmcError(f"unknown target {text!r}", place="--target", hint=f"one of {known}")
    if kind == "cuda":
        return Target("cuda", level or device_level())
    return Target("cpu", level or host_level())


def parse_targets(asked: str | Sequence[str]) -> tuple[Target, ...]:
    """The targets of an artifact, in the order of preference: "cuda:sm_90a,cpu", or a list of such texts."""
    texts = [part.strip() for text in ([asked] if isinstance(asked, str) else asked) for part in text.split(",")]
    targets = tuple(map(parse_target, texts))
    if not targets:
        raise LlmcError("no target is given", place="--target", hint="leave it out for this machine's CPU")
    if len({target.architecture for target in targets if target.kind == "cpu"}) > 1:
        fact = "one artifact cannot be for CPUs of x86-64 and of ARM"
        raise LlmcError(fact, place=f"--target {','.join(texts)}", hint="compile one for each")
    for index, target in enumerate(targets):
        if target in targets[:index]:
            fact = f"the target {target} is given twice"
            raise LlmcError(fact, place=f"--target {','.join(texts)}", hint="give each machine once")
    return targets


def architecture_of(targets: Sequence[Target]) -> str:
    """The architecture of the CPU that an artifact for these targets runs on."""
    return next((target for target in targets if target.kind == "cpu"), targets[0]).architecture


def never_chosen(targets: Sequence[Target]) -> list[str]:
    """A note for each target that is never chosen, because every machine for it runs one of those before it."""
    notes = []
    for index, target in enumerate(targets):
        before = next((other for other in targets[:index] if covers(other, target)), None)
        if before is not None:
            asked = " unless --device cuda asks for it" if before.kind != target.kind else ""
            notes.append(f"{target} will not run{asked}: {before}, which runs there too, stands before it")
    return notes


def covers(one: Target, other: Target) -> bool:
    """Whether code for `one` runs on every machine that code for `other` runs on.  Of GPUs that is not known: a later
    one of a generation may have too little shared memory."""
    if one.kind == "cuda":
        return False
    return other.kind == "cuda" or set(one.features) <= set(other.features)  # a machine with a GPU has a CPU


def missing(target: Target) -> list[str]:
    """What this machine lacks to run code for a target, in words; empty when it lacks nothing."""
    if target.kind == "cuda":
        return missing_device(target)
    if target.architecture != platform.machine():
        return [f"a CPU of {target.architecture}"]
    return sorted(set(target.features) - host_features())


def host_level() -> str:
    """The highest level this machine has."""
    flags = host_features()
    for level, features in reversed(LEVELS.items()):
        if flags.issuperset(features):
            return level
    is_arm = platform.machine() == "aarch64"
    missing = ", ".join(sorted(set(AARCH64 if is_arm else V3) - flags))
    hint = "llmc needs ARMv8.2 with dot products" if is_arm else "llmc needs x86-64-v3 (AVX2) or better"
    raise LlmcError(f"this CPU lacks {missing}", place="--target cpu", hint=hint)


def host_features() -> frozenset[str]:
    """CPU feature flags of this machine, those of AMX only where the system lets this process use it."""
    for line in CPUINFO.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            flags = frozenset(line.partition(":")[2].split())
            return flags - AMX if flags & AMX and not tiles_allowed() else flags
    return frozenset()


@cache
def tiles_allowed() -> bool:
    """Asks the system to let this process use AMX's tile registers, as the runtime does (cpu.c); whether it does."""
    refused: int = ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
    return refused == 0


def device_level() -> str:
    """The level of this machine's first NVIDIA GPU, asked of its driver."""
    hint = f"name the architecture: --target cuda:{CUDA_LEVELS[2]} (one of {', '.join(CUDA_LEVELS)})"
    try:
        driver = ctypes.CDLL(os.environ.get("LLMC_CUDA_DRIVER", "libcuda.so.1"))
        initialize, attribute = driver.cuInit, driver.cuDeviceGetAttribute
    except (OSError, AttributeError) as error:
        raise LlmcError("this machine has no NVIDIA driver to ask", place="--target cuda", hint=hint) from error
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        initialize(0)
        or attribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        or attribute(ctypes.byref(minor), 76, 0)
    )
    if failed:
        raise LlmcError(f"the NVIDIA driver reports no GPU (error {failed})", place="--target cuda", hint=hint)
    arch = 10 * major.value + minor.value
    fitting = [level for level in CUDA_LEVELS if runs_on(level, arch)]
    if not fitting:
        fact = f"no kernels are written for compute capability {major.value}.{minor.value}"
        raise LlmcError(fact, place="--target cuda", hint=f"llmc compiles for {', '.join(CUDA_LEVELS)}")
    return fitting[-1]


def missing_device(target: Target) -> list[str]:
    """What this machine lacks to run code for a GPU, in words; empty when it has such a device."""
    try:
        here = device_level()
    except LlmcError:
        return ["an NVIDIA GPU"]
    return [] if runs_on(target.level, Target("cuda", here).arch) else [f"a GPU of {target.level}"]


def runs_on(level: str, arch: int) -> bool:
    """Whether code for a CUDA level runs on a device of compute capability `arch` (10 * major + minor)."""
    made_for = Target("cuda", level).arch
    return made_for == arch if level.endswith("a") else made_for // 10 == arch // 10 and made_for <= arch

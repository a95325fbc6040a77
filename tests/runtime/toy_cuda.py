"""The toy model as an artifact for a GPU, and the driver that stands in for one."""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmc.compiler.link import kernel_table, runtime_sources
from llmc.runtime import format as fmt
from tests.runtime import toy_artifact as toy
from tests.runtime.toy_artifact import VOCAB, ToyPlan, link_c

SAMPLERS = (1, 4)
SHARED_BYTES = {"attend": 65536, "turn": 1024}
FAKE_DRIVER = "libcuda-fake.so"
CUBIN = b"\x7fELF, as the fake driver sees it"
SM_90A = 90 | fmt.CUDA_EXACT


def told(n_rows: int) -> list[tuple[str, int, int]]:
    """Where so many tokens are written."""
    return [(space, 0, 4 * n_rows) for space in ("chosen", "next", "told")]


class ToyCudaPlan(ToyPlan):
    """The toy's plans for a GPU: a head ends with choosing, and samplers are there."""

    def __init__(self, bodies: Sequence[int] = toy.BODIES, heads: Sequence[int] = toy.HEADS) -> None:
        super().__init__(bodies, heads)
        self.header = self.header._replace(device=fmt.DEVICES.index("cuda"), cuda_arch=SM_90A)
        logits = ("logits", 0, 4 * max(heads) * VOCAB)
        for s in SAMPLERS:
            operands = [logits, ("draws", 0, fmt.DRAW_BYTES * s), *told(s)]
            self.add_plan(2, s, [(f"draw_{s}", s, operands)])

    def head_calls(self, r: int) -> list[tuple[str, int, list[tuple[str, int, int]]]]:
        operands = [("logits", 0, 4 * r * VOCAB), *told(r)]
        return [*super().head_calls(r), (f"choose_{r}", r, operands)]

    def kernel_record(self, name: str, n_pointers: int) -> fmt.KernelRecord:
        kind = name.split("_")[0]
        flags = 0 if kind == "embed" else fmt.KERNEL_DEPENDENT
        return fmt.KernelRecord(name, n_pointers, 32, SHARED_BYTES.get(kind, 0), flags, int(kind == "draw"))


def sections(code: bytes = b"no code: the host has it", **changes: bytes) -> dict[str, bytes]:
    """The sections of a toy artifact for a GPU; `changes` replace some."""
    images = fmt.pack_images([CUBIN, CUBIN])
    return toy.toy_sections(code, **{"plan": ToyCudaPlan().pack(), "cuda": images, **changes})


def drawn(seed: int, position: int, temperature: float, top_k: int, top_p: float, best: int) -> int:
    """What the toy's sampler answers; see toy_cuda_kernels.c."""
    return (seed + 3 * position + 5 * top_k + int(temperature * 7) + int(top_p * 11) + best) % VOCAB


def build_driver(folder: Path) -> Path:
    """The fake libcuda.so.1, of another name: PyTorch's build for CUDA takes a library of that name for its own."""
    sources = sorted((toy.HERE / "fake_cuda").glob("*.c"))
    return link_c(folder / FAKE_DRIVER, sources, "-O1", "-g", "-shared")


def build_kernels(folder: Path) -> Path:
    """The toy's kernels as the fake driver runs them."""
    flags = ("-O1", "-g", "-shared", "-fvisibility=default", "-Wno-unused-function")
    return link_c(folder / "kernels.so", [toy.HERE / "toy_cuda_kernels.c"], *flags)


def build_code(folder: Path) -> bytes:
    """The ELF image of an artifact for a GPU: the runtime, and no kernels."""
    table = folder / "table.c"
    table.write_text(kernel_table([]))
    return link_c(folder / "code.so", [*runtime_sources(), table], "-O1", "-g", "-shared").read_bytes()


class FakeCuda:
    """The driver's settings for the models opened from now on, and what it saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: Path, kernels: Path, log: Path) -> None:
        self._monkeypatch, self._log = monkeypatch, log
        self._library = c.CDLL(str(driver))
        log.write_text("")
        monkeypatch.setenv("LLMC_CUDA_DRIVER", str(driver))
        monkeypatch.setenv("LLMC_FAKE_CUDA_KERNELS", str(kernels))
        monkeypatch.setenv("LLMC_FAKE_CUDA_LOG", str(log))
        for name in ("LLMC_CUDA_DEVICE", "LLMC_CUDA_SYNC", "LLMC_FAKE_CUDA"):
            monkeypatch.delenv(name, raising=False)

    def set(self, **settings: int | str) -> None:
        """The settings that fake_cuda/fake.h lists."""
        self._monkeypatch.setenv("LLMC_FAKE_CUDA", " ".join(f"{name}={value}" for name, value in settings.items()))

    @property
    def live(self) -> int:
        """Things taken from the driver and not given back."""
        return int(self._library.fake_cuda_live())

    def calls(self) -> list[str]:
        """What was called since this was asked for last, a line each."""
        lines = self._log.read_text().splitlines()
        self._log.write_text("")
        return lines

    def kinds(self) -> list[str]:
        """The same without numbers."""
        return [re.sub(r"[ \d]+$", "", line) for line in self.calls()]

"""The folder that is carried to the GPU machine, as its programs see it.

    kit.json          jobs: calls, and for each its candidates: parameters, launches, memory; kernels; models; chains
    kernels.tar.xz    every kernel's image by its name
    models/           artifacts without their weights (carry.py writes them, fill.py fills them)
    families.tar.xz   small artifacts, whole, and what they must say (small_models.py, families.py)
    run.py llmc/      the programs

A job is written by jobs.py; what it says of a call and a launch are the fields of compiler/kernel.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmc.compiler.kernel import Call, Operand, TensorType
from llmc.schedules.cuda.quant_strips import Fp8Strips, Int4Strips, Int8Strips
from llmc.schedules.cuda.tile_layout import GatedTiles, Tiles

LAYOUTS: dict[str, Any] = {
    "Tiles": Tiles,
    "GatedTiles": GatedTiles,
    "Int8Strips": Int8Strips,
    "Fp8Strips": Fp8Strips,
    "Int4Strips": Int4Strips,
}
ROW_MAJOR = "RowMajor"
SMALL = "families.tar.xz"
"""Small artifacts, all in one."""
KERNELS = "kernels.tar.xz"


@dataclass(frozen=True)
class Launched:
    """One launch of a candidate: the kernel's name, blocks, and operands in the kernel's order."""

    kernel: str
    grid: int
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Candidate:
    """One way to execute a call.  layouts: for each constant input the layout's name and fields."""

    params: dict[str, Any]
    words: str
    launches: tuple[Launched, ...]
    temps: tuple[int, ...]
    scratch_bytes: int
    kv_layer_bytes: int
    layouts: dict[int, dict[str, Any]]
    n_bytes: int
    n_operations: int


@dataclass(frozen=True)
class Job:
    """A call and its candidates, the rule's own choice first, then the best on paper.

    signature: what a tuned record of it is filed under; None: it is checked, but not tuned.
    lengths: for attention, contexts to measure it at.
    of_chain: it is there for a chain of layers (chain.py): not timed alone, and without a signature not checked either.
    """

    name: str
    rule: str
    call: Call
    candidates: tuple[Candidate, ...]
    signature: dict[str, Any] | None
    lengths: tuple[int, ...] = ()
    of_chain: bool = False

    @property
    def is_attention(self) -> bool:
        return self.call.op.endswith("PagedAttention")


class Kit:
    """A kit's folder, opened.  share: (k, n): of n runs beside each other, the k-th."""

    def __init__(self, folder: Path, share: tuple[int, int] = (1, 1)) -> None:
        self.folder, self.share = folder, share
        self.said: dict[str, Any] = json.loads((folder / "kit.json").read_text())
        self.remembered: dict[str, dict[str, str]] = {}

    @cached_property
    def jobs(self) -> dict[str, Job]:
        return {job.name: job for job in map(job_of, self.said["jobs"])}

    @cached_property
    def digest(self) -> str:
        """A hash of its jobs and models: what one kit found is not what another would find."""
        found = hashlib.sha256((self.folder / "kit.json").read_bytes())
        for model in (*self.said["models"], *(pair["artifact"] for pair in self.said["switched"])):
            for name in ("model.json", "sections.zip"):
                found.update((self.folder / "models" / model / name).read_bytes())
        if self.said.get("families"):
            found.update((self.folder / SMALL).read_bytes())
        return found.hexdigest()[:16]

    def shares(self, item: str) -> bool:
        """Whether an item is for this run, and not for one beside it; candidates of a job go together."""
        k, n = self.share
        return zlib.crc32((item.rpartition(" #")[0] or item).encode()) % n == k - 1

    def kernel(self, name: str) -> Mapping[str, Any]:
        """n_threads, shared_bytes and dependent of a kernel."""
        said: Mapping[str, Any] = self.said["kernels"][name]
        return said

    def cubin(self, name: str) -> bytes:
        return self._cubins[name]

    @cached_property
    def _cubins(self) -> dict[str, bytes]:
        with tarfile.open(self.folder / KERNELS) as file:
            return {member.name: found.read() for member in file if (found := file.extractfile(member))}


def write_cubins(folder: Path, cubins: Mapping[str, bytes]) -> None:
    """Compressed as one, for kernels are alike: a third of what they take one by one."""
    with tarfile.open(folder / KERNELS, "w:xz", preset=9) as file:
        for name, cubin in cubins.items():
            member = tarfile.TarInfo(name)
            member.size = len(cubin)
            file.addfile(member, io.BytesIO(cubin))


def job_of(said: Mapping[str, Any]) -> Job:
    """A job as kit.json has it."""
    call = said["call"]
    attributes = tuple((name, plain(value)) for name, value in call["attributes"])
    types = [[None if kind is None else type_of(kind) for kind in call[which]] for which in ("inputs", "outputs")]
    outputs = tuple(kind for kind in types[1] if kind is not None)
    return Job(
        said["name"],
        said["rule"],
        Call(call["op"], tuple(types[0]), outputs, attributes),
        tuple(map(candidate_of, said["candidates"])),
        said["signature"],
        tuple(said["lengths"]),
        said["of_chain"],
    )


def type_of(said: Mapping[str, Any]) -> TensorType:
    return TensorType(**{**said, "shape": tuple(said["shape"])})


def candidate_of(said: Mapping[str, Any]) -> Candidate:
    launches = [
        Launched(each["kernel"], each["grid"], tuple(Operand(kind, index) for kind, index in each["operands"]))
        for each in said["launches"]
    ]
    layouts = {int(index): layout for index, layout in said["layouts"].items()}
    rest = {key: said[key] for key in ("params", "words", "scratch_bytes", "kv_layer_bytes", "n_bytes", "n_operations")}
    return Candidate(launches=tuple(launches), temps=tuple(said["temps"]), layouts=layouts, **rest)


def plain(value: Any) -> Any:
    return tuple(map(plain, value)) if isinstance(value, list) else value


def call_to_json(call: Call) -> dict[str, Any]:
    return {
        "op": call.op,
        "inputs": [None if kind is None else asdict(kind) for kind in call.inputs],
        "outputs": [asdict(kind) for kind in call.outputs],
        "attributes": [list(pair) for pair in call.attributes],
    }


def layout_to_json(layout: Any) -> dict[str, Any]:
    return {"kind": type(layout).__name__, **asdict(layout)}

"""Every candidate of every job on random inputs, against PyTorch in float32.

The largest error is set against the largest result: sums are of products of rounded numbers, and so may be wrong by
about a rounding of the type that is multiplied.  Everything runs twice and must give the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from llmc.bench.gpu.driver import Device
from llmc.bench.gpu.kit import Job, Kit
from llmc.bench.gpu.memory import Checked, inputs_of
from llmc.compiler.kernel import Call
from llmc.schedules.states_call import is_stateful

STAGE = "check"
TOLERANCE = {"bf16": 2**-7, "f16": 2**-10, "f32": 1e-4}
ATTENTION_TOLERANCE = {"bf16": 8e-3, "f16": 1.2e-3, "f32": 1e-5}
"""By what is multiplied: of an int8 cache, what the result is in."""
FIRST_ROWS = (1, 8, 512)
"""Decode of one and of eight sequences, and a prompt."""
CODED = ("i8", "i4", "f8")
LENGTH = 200
"""Longest context of attention that is checked; the cache has more."""


def item(job: Job, index: int) -> str:
    return f"{job.name} #{index}"


def items(kit: Kit) -> Iterator[str]:
    """The rules' own choices: what models launch first, the rest of theirs, odd shapes; then every job's others, which
    share inputs and what must come out."""
    jobs = sorted((job for job in kit.jobs.values() if job.signature or not job.of_chain), key=order)
    yield from (item(job, 0) for job in jobs)
    yield from (item(job, index) for job in jobs for index in range(1, len(job.candidates)))


def order(job: Job) -> tuple[bool, bool, bool, int]:
    """Models' calls before odd shapes, plain weights before codes, the first numbers of rows, in their order, first."""
    rows = job.call.outputs[0].shape[0]
    coded = any(kind and kind.constant and kind.dtype in CODED for kind in job.call.inputs)
    return not job.signature, coded, rows not in FIRST_ROWS, FIRST_ROWS.index(rows) if rows in FIRST_ROWS else 0


def is_used_first(kit: Kit, name: str) -> bool:
    job, index = find(kit, name)
    return index == 0 and not any(order(job)[:3])


def is_odd(kit: Kit, name: str) -> bool:
    """A rule's own choice for an odd shape."""
    job, index = find(kit, name)
    return index == 0 and not job.signature


def find(kit: Kit, name: str) -> tuple[Job, int]:
    job, _, index = name.rpartition(" #")
    return kit.jobs[job], int(index)


def family(kit: Kit, name: str) -> tuple[str, str]:
    """The operator, and the first word of the kernel's name: one that hangs has relatives."""
    job, index = find(kit, name)
    kernel = job.candidates[index].launches[-1].kernel
    return job.call.op, re.split(r"_(?=b?f\d|int8|m\d)", kernel)[0]


def runner(device: Device, kit: Kit) -> Callable[[str], dict[str, Any]]:
    """run(item) -> what was found; raises ValueError for a wrong result."""
    from llmc.bench.gpu.reference import expected

    @lru_cache(maxsize=4)
    def reference(call: Call) -> Any:
        return expected(call, inputs_of(call, LENGTH))

    def run(name: str) -> dict[str, Any]:
        job, index = find(kit, name)
        right = reference(job.call)
        with device.kept():
            checked = Checked(device, kit, job, inputs_of(job.call, LENGTH))
            y, again = (checked.run(job.candidates[index]) for _ in range(2))
        return compare(job, y, again, right)

    return run


def compare(job: Job, y: Any, again: Any, expected: Any) -> dict[str, Any]:
    largest = float(np.abs(expected).max()) or 1.0
    error = float(np.abs(y - expected).max()) / largest
    limit = tolerance(job)
    if not error <= limit:  # NaN is no number below the limit
        wrong = int((~(np.abs(y - expected) <= limit * largest)).sum())
        raise ValueError(f"wrong by {error:.3g} of the largest result (allowed: {limit:.3g}), {wrong} of {y.size}")
    if y.tobytes() != again.tobytes():
        raise ValueError("a second run gives other bits")
    return {"error": error, "allowed": limit}


def tolerance(job: Job) -> float:
    if job.is_attention:
        kv_dtype = job.call.attribute("kv_dtype")
        return ATTENTION_TOLERANCE[job.call.outputs[0].dtype if kv_dtype == "int8" else kv_dtype]
    if is_stateful(job.call):
        return TOLERANCE["f32"]
    kinds = {kind.dtype for kind in (*job.call.inputs, *job.call.outputs) if kind and (kind.constant or kind.tiled)}
    weights = [kind for kind in job.call.inputs if kind and kind.constant and len(kind.shape) == 2]
    if weights and weights[0].dtype == "f32":
        return TOLERANCE["f32"]
    return TOLERANCE["f16" if "f16" in kinds else "bf16"]
